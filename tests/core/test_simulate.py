"""The replay of policies over a trace, against tables worked out by hand and the live engine."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import offramp
from offramp import Trace
from offramp.policy import ExitPolicy
from offramp.testing.calibrators import toy_trace

NAN = float("nan")


def small(**more):
    """Four rows over exits at 2 and 4 of a model of 6 blocks."""
    options = {
        "stats": {"top1": torch.tensor([[0.9, 0.9, 1.0], [0.5, 0.9, 1.0], [0.5, 0.5, 1.0], [NAN, 0.9, 1.0]])},
        "label": torch.tensor([[1, 1, 1], [0, 1, 0], [2, 2, 2], [0, 0, 3]]),
        "classes": 4,
        **more,
    }
    return Trace((2, 4, 6), **options)


def test_a_threshold_by_hand():
    out = offramp.simulate(small(), "confidence", threshold=0.8)
    assert out.columns.tolist() == [0, 1, 2, 1] and out.depths.tolist() == [2, 4, 6, 4]
    assert out.labels.tolist() == [1, 1, 2, 0]
    assert out.depth_mean == 4.0 and out.cost_mean == 4.0 and out.saved == pytest.approx(1 / 3)
    assert out.agreement == 0.5 and out.accuracy is None


def test_accuracy_is_over_labelled_rows_only():
    out = offramp.simulate(small(targets=torch.tensor([1, 1, 0, -100])), "confidence", threshold=0.8)
    assert out.accuracy == pytest.approx(2 / 3)
    assert offramp.simulate(small(targets=torch.full((4,), -100)), "never").accuracy is None


def test_costs_need_not_be_blocks():
    out = offramp.simulate(small(costs=torch.tensor([1.0, 10.0, 20.0])), "confidence", threshold=0.8)
    assert out.cost_mean == (1 + 10 + 20 + 10) / 4 and out.saved == pytest.approx(1 - 10.25 / 20)


def test_never_is_the_full_model():
    out = offramp.simulate(small(), "never")
    assert out.depths.tolist() == [6] * 4 and out.saved == 0.0 and out.agreement == 1.0


def test_rows_with_nan_go_on_whatever_the_policy_says():
    """`fixed` looks at no statistic at all; the executor lets such rows run on, and so does the replay."""
    assert offramp.simulate(small(), "fixed", depth=2).columns.tolist() == [0, 0, 0, 1]


def test_the_undefined_cosine_of_the_first_column_holds_nobody_back():
    stats = {"top1": torch.full((2, 3), 0.9), "cosine": torch.tensor([[NAN, 0.1, 0.1], [NAN, 0.99, 0.1]])}
    trace = Trace((2, 4, 6), stats, label=torch.zeros(2, 3, dtype=torch.long), classes=4)
    assert offramp.simulate(trace, "saturation", threshold=0.9).columns.tolist() == [2, 1]
    either = [{"policy": "saturation", "threshold": 0.9}, {"policy": "confidence", "threshold": 0.8}]
    assert offramp.simulate(trace, "any_of", policies=either).columns.tolist() == [0, 0]


@dataclass(frozen=True)
class Watch(ExitPolicy):
    """Notes what it is shown; stops row `who` at exit `who`."""

    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    log = []

    def start(self, batch, device):
        Watch.log.clear()
        return {"who": torch.arange(batch)}

    def step(self, state, seen):
        Watch.log.append((state["who"].tolist(), seen))
        return state["who"] == seen.index, state


def test_the_policy_sees_what_the_live_engine_shows_it():
    trace = small(position=torch.tensor([5, 6, 7, 8]), stats={})
    out = offramp.simulate(trace, Watch())
    (rows0, first), (rows1, second) = Watch.log
    assert rows0 == [0, 1, 2, 3] and rows1 == [1, 2, 3], "a row's state leaves with it; the full model is not asked"
    assert (first.index, first.depth, first.first, first.last) == (0, 2, True, False)
    assert (second.index, second.depth, second.first, second.last) == (1, 4, False, True)
    assert second["label"].tolist() == [1, 2, 0] and second.position.tolist() == [6, 7, 8] and second.classes == 4
    assert out.columns.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "patience", "saturation", "decaying", "tempered"])
def test_a_batch_replays_as_its_rows_do(name):
    from offramp._registry import lookup

    trace = toy_trace(rows=40)
    policy = lookup(ExitPolicy, name).example(trace.depths[:-1], trace.classes)
    whole = offramp.simulate(trace, policy)
    assert whole.columns.tolist() == [offramp.simulate(trace[i], policy).columns.item() for i in range(40)]
    assert len(set(whole.columns.tolist())) > 1


def test_a_calibration_and_a_config_are_policies_too():
    policy = offramp.policy("confidence", threshold=0.8)
    for form in (policy, policy.config(), offramp.Calibration(policy)):
        assert offramp.simulate(small(), form).columns.tolist() == [0, 1, 2, 1]
