"""Early exit for the models people already use: attach exit heads, choose a policy, calibrate it, enable it."""

from __future__ import annotations

from typing import Any

from offramp import kernels as kernels
from offramp._registry import create as _create
from offramp._registry import names as names
from offramp._registry import register as register
from offramp._version import __version__ as __version__
from offramp.attach import Exits as Exits
from offramp.attach import attach as attach
from offramp.attach import load as load
from offramp.backbone import Backbone as Backbone
from offramp.backbone import Tap as Tap
from offramp.calibrate import calibrate as calibrate
from offramp.calibration import Calibration as Calibration
from offramp.calibrator import Calibrator as Calibrator
from offramp.calibrator import Certificate as Certificate
from offramp.cascade import Cascade as Cascade
from offramp.cascade import cascade as cascade
from offramp.draft import DraftRule as DraftRule
from offramp.enable import Run as Run
from offramp.enable import Stats as Stats
from offramp.enable import enable as enable
from offramp.errors import OfframpError as OfframpError
from offramp.fit import FitReport as FitReport
from offramp.fit import fit as fit
from offramp.gate import ExitGate as ExitGate
from offramp.head import ExitHead as ExitHead
from offramp.head import HeadContext as HeadContext
from offramp.loss import Loss as Loss
from offramp.policy import Evidence as Evidence
from offramp.policy import ExitPolicy as ExitPolicy
from offramp.policy import Feedback as Feedback
from offramp.record import record as record
from offramp.simulate import Outcome as Outcome
from offramp.simulate import simulate as simulate
from offramp.trace import Trace as Trace


def policy(name: str, **config: Any) -> ExitPolicy:
    """Build the exit policy called `name`; raises `UnknownName` with the names or options that exist."""
    made: ExitPolicy = _create(ExitPolicy, name, **config)
    return made
