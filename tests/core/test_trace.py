"""The trace: shapes, slices and files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

import offramp
from offramp import Trace
from offramp.errors import BadArgument, DamagedFile
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
