"""A certificate in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: what a bound on each risk says about the rows it is a mean over
RISKS = {
    "disagreement": "an answer is not the one that the full model gives in at most {alpha} of the cases",
    "accuracy_drop": "an answer is wrong where the full model's is right in at most {alpha} of the cases",
    "excess_loss": "the loss exceeds that of the full model by at most {alpha} on average (per sample cut to 0 .. 1)",
}
TESTS = {
    "binomial": "the exact binomial test, for losses that are 0 or 1",
    "hoeffding_bentkus": "the Hoeffding-Bentkus bound, for losses between 0 and 1",
}


def percent(value: float) -> str:
    """Return a share as a percentage with as many digits as it needs."""
    return f"{100 * value:.4g} %"


def promise(certificate: Mapping[str, Any] | None, note: str = "") -> str:
    """Return what is promised in one sentence, or that nothing is and why."""
    if certificate is None:
        why = note.removeprefix("uncertified: ") or "this run was not calibrated."
        return f"Uncertified, so nothing is promised: {why}"
    risk, alpha = certificate["risk"], certificate["alpha"]
    bound = percent(alpha) if risk != "excess_loss" else f"{alpha:g}"
    said = RISKS.get(risk, f"the risk {risk!r} is at most {{alpha}}").format(alpha=bound)
    return (
        f"With {percent(1 - certificate['delta'])} confidence, {said}, for inputs drawn like the "
        f"{certificate['n']:,} calibration samples."
    )


def explain(certificate: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Return (field, value, meaning) for every field of a certificate; nothing for None."""
    if certificate is None:
        return []
    c = certificate
    order = list(c["order"])
    ends = f"{_short(order[0])} to {_short(order[-1])}" if order else "none"
    return [
        ("risk", str(c["risk"]), "what is bounded"),
        ("alpha", f"{c['alpha']:g}", "the bound on the risk"),
        ("delta", f"{c['delta']:g}", "the chance that the calibration data misled and the promise does not hold"),
        ("n", f"{c['n']:,}", "calibration samples, one per independent row"),
        ("p_value", f"{c['p_value']:.3g}", "of the chosen setting: the chance of data this good at a risk above alpha"),
        ("test", str(c["test"]), TESTS.get(str(c["test"]), "the statistical test")),
        ("order", f"{len(order)} settings, {ends}", "tried from safe to bold, fixed before the data was seen"),
        ("data_hash", str(c["data_hash"]), "sha256 of the trace that this was computed from"),
        ("model_hash", str(c["model_hash"]), "digest of the model and heads that this was computed for"),
    ]


def _short(setting: Any) -> str:
    text = f"{setting:g}" if isinstance(setting, (int, float)) else str(setting)
    return text if len(text) <= 40 else text[:37] + "..."
