"""The trace: shapes, slices, files, and the replay of policies, against tables worked out by hand."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load, save

import offramp
from offramp import Trace
from offramp.errors import BadArgument, DamagedFile
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


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        (torch.tensor([2]), [2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (2, [2]),
        (-1, [3]),
        ([], []),
        (range(2), [0, 1]),
    ],
)
def test_some_rows(rows, kept):
    trace = small(targets=torch.arange(4), logits=torch.randn(4, 3, 4), model_hash="m")
    part = trace[rows]
    assert len(part) == len(kept) and part.targets.tolist() == kept
    assert torch.equal(part.label, trace.label[kept]) and torch.equal(part.logits, trace.logits[kept])
    assert part.depths == trace.depths and part.model_hash == "m" and torch.equal(part.costs, trace.costs)


def everything():
    trace = replace(toy_trace(rows=30), unit="seconds")
    trace.stats["top1"][3, 1] = NAN
    return trace


def test_round_trip_is_exact(tmp_path):
    trace = everything()
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(str(tmp_path / "t.safetensors"))
    ours, theirs = trace._arrays(), again._arrays()
    assert ours.keys() == theirs.keys() and {"targets", "position", "losses", "logits"} < ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor.nan_to_num(7.0), theirs[name].nan_to_num(7.0))
    assert (again.depths, again.classes, again.model_hash) == (trace.depths, trace.classes, trace.model_hash)
    assert again.unit == trace.unit == "seconds"
    assert again.data_hash == trace.data_hash
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"], "nothing temporary is left"


def test_round_trip_of_the_least_a_trace_can_be(tmp_path):
    trace = small(stats={})[[]]
    trace.save(tmp_path / "t")
    assert len(Trace.load(tmp_path / "t")) == 0


def test_data_hash_sees_every_array():
    base = everything()
    seen = {base.data_hash}
    for name in base._arrays():
        changed = everything()
        flat = changed._arrays()[name].reshape(-1)
        flat[-1] = flat[-1] + 1
        seen.add(changed.data_hash)
    assert len(seen) == 1 + len(base._arrays())
    table = torch.ones(4, 3)
    assert small(stats={"top1": table}).data_hash != small(stats={"margin": table}).data_hash
    assert everything().data_hash == base.data_hash != base[:29].data_hash


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "other file":
        path.write_bytes(save({"w": torch.zeros(3)}))
    elif how == "no file":
        path.unlink()
    else:
        tensors, size = load(data), int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        body = json.loads(meta["trace"])
        if how == "tampered":
            tensors["stats.top1"][0, 0] += 0.5
        elif how == "newer":
            body["format"] = 99
        elif how == "array gone":
            del tensors["label"]
        elif how == "wrong shape":
            tensors["label"] = tensors["label"][:, :1].clone()
        path.write_bytes(save(tensors, {"trace": json.dumps(body)}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("other file", "not a trace"),
        ("no file", "cannot be read"),
        ("tampered", "data_hash differs"),
        ("newer", "format 99, this offramp reads up to 1: pip install"),
        ("array gone", "not complete"),
        ("wrong shape", "not complete .*expected"),
    ],
)
def test_damaged_files_are_refused(tmp_path, how, message):
    everything().save(tmp_path / "t")
    damage(tmp_path / "t", how)
    with pytest.raises(DamagedFile, match=message):
        Trace.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(label=torch.zeros(4, 2, dtype=torch.long)), r"label has shape \[4, 2\], expected \[4, 3\]"),
        (lambda: small(targets=torch.zeros(3)), "targets has shape"),
        (lambda: small(costs=torch.zeros(2)), "costs has shape"),
        (lambda: small(logits=torch.zeros(4, 3, 5)), "logits has shape"),
        (lambda: small(costs=torch.tensor([3.0, 2.0, 6.0])), r"costs must .* grow with depth.*\[3.0, 2.0, 6.0\]"),
        (lambda: small(costs=torch.tensor([2.0, 2.0, 6.0])), "costs must"),
        (lambda: small(costs=torch.tensor([0.0, 2.0, 6.0])), "above 0"),
        (lambda: small(costs=torch.tensor([1.0, NAN, 6.0])), "costs must"),
        (lambda: small(targets=torch.tensor([0, 1, 2, 4])), r"targets must be .* 0 to 3 \(classes=4\).*from 0 to 4"),
        (lambda: small(targets=torch.tensor([0, -1, 2, 3])), "or -100 for a target .*from -1 to 3"),
        (lambda: small(classes=3), "label must be whole numbers from 0 to 2"),
        (lambda: Trace((2, 2, 6), {}, torch.zeros(1, 3), 4), "depths must be ascending"),
        (lambda: Trace((6,), {}, torch.zeros(1, 1), 4), "an exit and the full depth"),
        (lambda: offramp.simulate(small()[[]], "never"), "the trace has no rows"),
        (lambda: offramp.simulate(small(), "margin", threshold=0.5), "does not hold margin .*record it again"),
        (
            lambda: offramp.simulate(
                small(), "tempered", inner={"policy": "confidence", "threshold": 0.5}, temperature=2.0
            ),
            "does not hold prediction .*logits=True",
        ),
        (lambda: offramp.simulate(small(), "patience", patience=2), "could never fire"),
        (lambda: offramp.simulate(small(), "confidence", threshold=[0.5] * 3), "3 thresholds for 2 exits"),
        (lambda: offramp.simulate(small(), "confidense"), "did you mean 'confidence'"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(BadArgument, match=message):
        make()
