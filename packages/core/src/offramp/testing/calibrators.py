"""The contract of a calibrator, as a function to call from a test: `check_calibrator(MyCalibrator())`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from offramp._registry import create
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
from offramp.kernels.confidence import confidence, cosine
from offramp.policy import ExitPolicy
from offramp.risks import losses
from offramp.simulate import exit_columns, simulate
from offramp.testing import ContractError, require
from offramp.trace import UNLABELLED, Trace


def toy_trace(rows: int = 400, depths: tuple[int, ...] = (2, 4, 6, 8), classes: int = 5, seed: int = 0) -> Trace:
    """Return a trace of rows that settle with depth, some early and some late, with everything a trace can hold."""
    make = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=make)
    hard = torch.rand(rows, 1, generator=make)
    states, logits = [], []
    for depth in depths:
        noise = torch.randn(rows, classes, generator=make) * 2 * hard * (1 - depth / (depths[-1] + 1))
        sure = 1.0 + 3.0 * (1 - hard) + 2.0 * depth / depths[-1]
        states.append(noise + sure * torch.nn.functional.one_hot(targets, classes))
        logits.append(states[-1])
    found = [confidence(z, {"top1", "margin", "entropy", "label"}) for z in logits]
    stats = {k: torch.stack([f[k] for f in found], 1) for k in ("top1", "margin", "entropy")}
    near = [torch.full((rows,), float("nan")), *(cosine(b, a) for a, b in zip(states[:-1], states[1:], strict=True))]
    each = [torch.nn.functional.cross_entropy(z, targets, reduction="none") for z in logits]
    return Trace(
        depths,
        {**stats, "cosine": torch.stack(near, 1), "gate": stats["top1"].square(), "agrees": stats["top1"].square()},
        label=torch.stack([f["label"] for f in found], 1),
        classes=classes,
        targets=targets,
        position=torch.arange(rows) % 16,
        losses=torch.stack(each, 1),
        logits=torch.stack(logits, 1),
        model_hash="toy",
    )


def check_calibrator(
    calibrator: Calibrator, trace: Trace | None = None, policy: ExitPolicy | None = None, risk: str = "disagreement"
) -> Calibration:
    """Raise `ContractError` unless `calibrator` keeps every rule of `Calibrator`; returns what it found.

    Deterministic; the trace is left as it was; the policy fits the trace's exits and can be simulated; save and load
    give the same calibration; a certificate names what it promises, and an uncertified one says so in its note.
    """
    trace = toy_trace() if trace is None else trace
    policy = create(ExitPolicy, "confidence", threshold=0.5) if policy is None else policy
    before = trace.data_hash
    found = calibrator.fit(trace, policy, alpha=0.1, delta=0.1, risk=risk)
    require(isinstance(found, Calibration), calibrator, f"fit must return a Calibration, not {type(found).__name__}")
    again = calibrator.fit(trace, policy, alpha=0.1, delta=0.1, risk=risk)
    require(found == again, calibrator, "two fits on the same trace differ")
    require(trace.data_hash == before, calibrator, "fit changed the trace")
    found.policy.check(trace.depths[:-1])
    simulate(trace, found.policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.json"
        found.save(path)
        loaded = Calibration.load(path)
    require(loaded == found, calibrator, f"save and load give {loaded}, not {found}")
    _check_promise(calibrator, found, trace, type(calibrator).risk if type(calibrator).own_risk else risk)
    return found


def _check_promise(calibrator: Calibrator, found: Calibration, trace: Trace, risk: str) -> None:
    certificate = found.certificate
    if certificate is None:
        require(bool(found.note), calibrator, "without a certificate the note must say why nothing is promised")
        return
    asked = (certificate.risk, certificate.alpha, certificate.delta)
    require(asked == (risk, 0.1, 0.1), calibrator, f"the certificate is for {asked}, asked was {(risk, 0.1, 0.1)}")
    on = (certificate.data_hash, certificate.model_hash)
    require(
        on == (trace.data_hash, trace.model_hash), calibrator, "the certificate does not name the data and the model"
    )
    require(0 <= certificate.p_value <= certificate.delta, calibrator, f"p = {certificate.p_value} is above delta")
    require(0 < certificate.n <= len(trace), calibrator, f"n = {certificate.n} rows of a trace of {len(trace)}")
    columns = exit_columns(trace, found.policy)
    mean = missed(trace, found, columns).mean() if risk == "miscoverage" else losses(trace, columns, risk).mean()
    require(float(mean) <= certificate.alpha, calibrator, f"the risk on the trace itself is {mean:.4g}, above alpha")


def missed(trace: Trace, found: Calibration, columns: torch.Tensor) -> torch.Tensor:
    """Return 1 for each labelled row whose right label is not in the set at its column [N], else 0; needs logits."""
    if found.sets is None or trace.logits is None or trace.targets is None:
        raise ContractError("without sets, logits and labels nobody can tell whether the right label is in its set")
    rows = (trace.targets != UNLABELLED).nonzero().squeeze(-1)
    answers = trace.logits[rows, columns[rows]]
    sets = found.sets.of(answers, torch.tensor(trace.depths)[columns[rows]])
    return (~sets.gather(1, trace.targets[rows, None])).squeeze(1).double()
