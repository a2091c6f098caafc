"""One temperature per exit, found again where it is known, and applied live as well as offline."""

import math

import numpy as np
import pytest
import torch

import offramp
from offramp import Trace
from offramp.calibrators.temperature import best_temperature
from offramp.kernels.confidence import confidence
from offramp.testing.calibrators import toy_trace


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found_again(truth):
    """Labels drawn from softmax(z): logits reported as z * T are right at temperature T."""
    random = np.random.default_rng(0)
    z = random.normal(size=(20000, 4)) * 2
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    label = (p.cumsum(-1) > random.uniform(size=(20000, 1))).argmax(-1)
    assert best_temperature(z * truth, label) == pytest.approx(truth, rel=0.04)


def test_two_classes_by_hand():
    """Three of four rows right at logit 2: softmax must say .75, so 2 / T = ln 3."""
    z = np.tile([2.0, 0.0], (4, 1))
    assert best_temperature(z, np.array([0, 0, 0, 1])) == pytest.approx(2 / math.log(3), rel=1e-4)


def test_rows_that_are_not_finite_or_not_labelled_are_left_out():
    z = np.tile([2.0, 0.0], (6, 1))
    z[4, 0] = np.nan
    assert best_temperature(z, np.array([0, 0, 0, 1, 1, -100])) == pytest.approx(2 / math.log(3), rel=1e-4)
    assert best_temperature(z[4:5], np.array([0])) == 1.0


def overconfident(n=3000):
    """Two exits that claim far more than they keep: 3 and 2 times too large logits."""
    make = torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, 4, generator=make)
    label = z[:, 2].softmax(-1).multinomial(1, generator=make).squeeze(1)
    z[:, 2] = torch.nn.functional.one_hot(label, 4) * 5.0
    sampled = torch.stack([z[:, 2].argmax(-1)] * 3, 1)
    honest = torch.log_softmax(torch.nn.functional.one_hot(label, 4) * 1.0 + torch.randn(n, 4, generator=make), -1)
    logits = torch.stack([honest * 3, honest * 2, z[:, 2]], 1)
    stats = {k: torch.stack([confidence(logits[:, i], {k})[k] for i in range(3)], 1) for k in ("top1", "margin")}
    labels = logits.argmax(-1)
    labels[:, 2] = sampled[:, 2]
    return Trace((2, 4, 6), stats, labels, 4, logits=logits)


def test_each_exit_gets_its_own_temperature_and_an_honest_confidence():
    trace = overconfident()
    cal = offramp.calibrate(trace, "confidence", method="temperature", threshold=0.5)
    first, second = cal.policy.temperature
    assert first / second == pytest.approx(1.5, rel=1e-3)
    right = (trace.label[:, 0] == trace.label[:, -1]).double().mean()
    claimed = confidence(trace.logits[:, 0], {"top1"})["top1"].mean()
    honest = confidence(trace.logits[:, 0] / first, {"top1"})["top1"].mean()
    assert claimed - right > 0.15 and abs(honest - right) < 0.02


def test_it_changes_what_the_policy_does_and_promises_nothing():
    trace = overconfident()
    cal = offramp.calibrate(trace, "confidence", method="temperature", threshold=0.9)
    assert cal.certificate is None and "other rows" in cal.note
    assert (
        offramp.simulate(trace, cal).depth_mean > offramp.simulate(trace, "confidence", threshold=0.9).depth_mean + 0.5
    )


def test_its_policy_can_then_be_certified_on_other_rows():
    trace = toy_trace(rows=800)
    warm = offramp.calibrate(trace[:400], "confidence", method="temperature")
    sure = offramp.calibrate(trace[400:], warm, alpha=0.1)
    assert sure.policy.temperature == warm.policy.temperature and sure.certificate.n == 400


def test_labels_instead_of_the_full_model():
    trace = toy_trace()
    spoilt = Trace(
        trace.depths, trace.stats, trace.label, trace.classes, targets=(trace.targets + 1) % 5, logits=trace.logits
    )
    full = offramp.calibrate(spoilt, "confidence", method="temperature")
    labels = offramp.calibrate(spoilt, "confidence", method="temperature", to="targets")
    assert full.policy.temperature == offramp.calibrate(trace, "confidence", method="temperature").policy.temperature
    assert min(labels.policy.temperature) > 10 * max(full.policy.temperature)  # every label wrong: be sure of nothing


@pytest.mark.parametrize(
    ("trace", "options", "message"),
    [
        (Trace((1, 2), {}, torch.zeros(1, 2, dtype=torch.long), 2), {}, "keeps none; record it .*logits=True"),
        (overconfident(5), {"to": "targets"}, "needs labels"),
        (overconfident(5), {"to": "teacher"}, 'to must be "full" or "targets"'),
    ],
)
def test_what_is_missing_is_named(trace, options, message):
    with pytest.raises(offramp.OfframpError, match=message):
        offramp.calibrate(trace, "confidence", method="temperature", **options)
