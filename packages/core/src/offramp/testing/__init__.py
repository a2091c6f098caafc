"""Contract suites and a toy backbone, shipped so that third parties can test what they add to offramp."""

from __future__ import annotations

from offramp.errors import OfframpError


class ContractError(OfframpError, AssertionError):
    """A policy, head, loss, calibrator or backbone breaks the contract it was registered under."""


def require(holds: bool, who: object, why: str) -> None:
    """Raise `ContractError` naming the class of `who` and saying `why`, unless `holds`."""
    if not holds:
        raise ContractError(f"{type(who).__name__}: {why}")
