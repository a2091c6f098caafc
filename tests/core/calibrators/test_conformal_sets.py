"""Sets of labels: quantiles by hand and against mapie, coverage by exit and by class, and the promise over draws."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

import offramp
from offramp import Trace
from offramp.errors import BadArgument
from offramp.pvalues import certain_rank, expected_rank
from offramp.simulate import exit_columns
from offramp.testing.calibrators import missed, toy_trace

POLICY = offramp.policy("confidence", threshold=0.8)
ALPHA, DELTA, TRIALS = 0.1, 0.1, 1000


def calibrate(trace, policy=POLICY, **more):
    return offramp.calibrate(trace, policy, method="conformal_sets", **{"alpha": ALPHA, "delta": DELTA, **more})


@pytest.mark.parametrize("n", [10, 99, 100, 333])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_ranks(n, alpha):
    assert expected_rank(n, alpha) == math.ceil(round((n + 1) * (1 - alpha), 9))
    rank = certain_rank(n, alpha, 0.1)
    assert binom.cdf(n - rank, n, alpha) <= 0.1 and binom.cdf(n - rank + 1, n, alpha) > 0.1


def test_the_cut_by_hand():
    """99 rows leave; their right labels have .99 twice, then .98, .97, ..., .02; alpha .1: the 90th largest is .11."""
    p = torch.arange(1, 100) / 100
    logits = torch.stack([p.log(), (1 - p).log()], 1)[:, None].expand(-1, 2, -1)
    stats = {"top1": torch.ones(99, 2)}
    label = logits.argmax(-1)
    trace = Trace((1, 2), stats, label, 2, targets=torch.zeros(99, dtype=torch.long), logits=logits)
    trace.targets[0] = 1  # where class 0 has .01
    cal = calibrate(trace, average=True)
    assert cal.sets.cuts == (pytest.approx(0.11), 0.0) and cal.certificate is None and "on average" in cal.note
    assert cal.policy == POLICY


def test_the_average_quantile_is_mapies(digits):
    import mapie.classification as mapie
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier that says what the digits' first exit said."""

        classes_, fitted_ = np.arange(10), True

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(1)

    first = offramp.policy("fixed", depth=1)
    cal = calibrate(digits[:500], first, average=True)
    p = digits.logits[:, 0].softmax(-1).double().numpy()
    theirs = mapie.SplitConformalClassifier(Given(), confidence_level=1 - ALPHA, conformity_score="lac", prefit=True)
    theirs.conformalize(p[:500], digits.targets[:500].numpy())
    _, sets = theirs.predict_set(p[500:])
    ours = cal.sets.of(digits.logits[500:, 0], torch.ones(len(digits) - 500))
    assert ours.numpy().tolist() == sets[:, :, 0].tolist() and len(set(ours.sum(1).tolist())) > 1


def test_every_exit_covers_its_own_rows():
    cal, fresh = calibrate(toy_trace(4000)), toy_trace(40_000, seed=1)
    columns = exit_columns(fresh, cal.policy)
    out = missed(fresh, cal, columns)
    assert cal.certificate.risk == "miscoverage" and cal.certificate.test == "binomial by exit"
    assert all(float(out[columns == k].mean()) <= ALPHA for k in range(4) if (columns == k).sum() > 1000)


def test_every_class_covers_its_own_rows():
    """Class 0 is hard, the others easy. One cut for all lets class 0 pay; a cut per class does not."""
    random = np.random.default_rng(0)

    def rows(n):
        y = torch.tensor(random.integers(0, 5, n))
        y[random.uniform(size=n) < 0.9] = 1
        z = 4 * torch.nn.functional.one_hot(y, 5) + torch.tensor(random.normal(size=(n, 5)))
        z[y == 0] = torch.tensor(random.normal(size=(int((y == 0).sum()), 5)))
        z = z.float()[:, None].expand(-1, 2, -1)
        return Trace((1, 2), {"top1": torch.ones(n, 2)}, z.argmax(-1), 5, targets=y, logits=z)

    trace, fresh = rows(8000), rows(20_000)
    for by_class in (False, True):
        cal = calibrate(trace, by_class=by_class)
        of0 = float(missed(fresh, cal, exit_columns(fresh, cal.policy))[fresh.targets == 0].mean())
        assert of0 <= ALPHA if by_class else of0 > 0.5


def test_losses_do_in_place_of_logits():
    trace = toy_trace(1000)
    bare = Trace(trace.depths, trace.stats, trace.label, 5, targets=trace.targets, losses=trace.losses)
    assert np.allclose(calibrate(trace).sets.cuts, calibrate(bare).sets.cuts, atol=1e-6)


def test_an_exit_with_too_few_rows_keeps_all_classes_and_says_so():
    trace = toy_trace(400)
    cal = calibrate(trace, offramp.policy("confidence", threshold=0.65))
    few = exit_columns(trace, cal.policy).bincount(minlength=4)
    assert 0 < few[-1] < 22 and cal.sets.cuts[-1] == 0.0
    assert f"depth 8 ({few[-1]} rows)" in cal.note and "are needed for each" in cal.note
    assert bool(cal.sets.of(torch.randn(5, 5), [8] * 5).all())


def test_where_no_exit_has_enough_nothing_is_certified():
    cal = calibrate(toy_trace(15))
    assert cal.certificate is None and cal.note.startswith("uncertified: too few rows")


def test_live_rows_get_the_sets_of_a_simulation(tmp_path):
    trace = toy_trace(1000)
    calibrate(trace).save(tmp_path / "c")
    cal = offramp.Calibration.load(tmp_path / "c")
    assert cal == calibrate(trace)
    out = offramp.simulate(trace, cal)
    answers = trace.logits[torch.arange(1000), out.columns]
    inside = cal.sets.of(answers, out.depths).gather(1, trace.targets[:, None]).squeeze(1)
    assert torch.equal((~inside).double(), missed(trace, cal, out.columns))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: offramp.calibrate(toy_trace(), "confidence", method="conformal_sets"), "missing"),
        (lambda: calibrate(toy_trace(), risk="disagreement"), "bounds 'miscoverage' and no other risk"),
        (lambda: calibrate(toy_trace(), average=1), "True or False"),
        (lambda: calibrate(Trace((1, 2), toy2(), torch.zeros(9, 2).long(), 2)), "needs the right labels"),
        (
            lambda: calibrate(Trace((1, 2), toy2(), torch.zeros(9, 2).long(), 2, targets=torch.arange(9) % 2)),
            "logits or task losses",
        ),
        (lambda: calibrate(toy_trace()).sets.of(torch.randn(2, 5), [2, 3]), r"depths \[3\].*\[2, 4, 6, 8\]"),
        (lambda: calibrate(toy_trace()).sets.of(torch.randn(2, 5), [2]), "one per row"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(BadArgument, match=message):
        make()


def toy2():
    return {"top1": torch.full((9, 2), 0.9)}


@pytest.mark.slow
@pytest.mark.parametrize("by_class", [False, True])
def test_the_promise_on_real_rows(digits, draws, by_class):
    """1,000 draws; an exit (and class) of any one may be above alpha on all the rows in at most delta of the draws."""
    columns = exit_columns(digits, POLICY)
    groups = columns * 10 + digits.targets if by_class else columns
    broken, sizes = 0, []
    for trace in draws(TRIALS, 600):
        cal = calibrate(trace, by_class=by_class, alpha=0.2 if by_class else ALPHA)
        out = missed(digits, cal, columns)
        worst = max(float(out[groups == g].mean()) for g in groups.unique())
        broken += worst > (0.2 if by_class else ALPHA)
        sets = cal.sets.of(digits.logits[torch.arange(len(digits)), columns], columns + 1)
        sizes.append(float(sets.sum(1).double().mean()))
    assert broken / TRIALS <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
    assert np.mean(sizes) < (8 if by_class else 3)  # of 10 classes
