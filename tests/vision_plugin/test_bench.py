"""`offramp bench vision`: what it counts, on a model small enough to measure in a second."""

import json
from itertools import accumulate

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import offramp
from offramp._plugins import adapt
from offramp.cli import build
from offramp.errors import BadArgument
from offramp_vision.bench import AT, Ask, Evenly, Parts, _left, bench

SMALL = "mobilenetv3_small_050"


def test_the_command_counts_what_left(tmp_path):
    out = tmp_path / "bench.json"
    words = f"bench vision --model {SMALL} --batch 1 --batch 4 --head conv --repeats 1 --json {out}"
    said = CliRunner().invoke(build(), words.split())
    assert said.exit_code == 0, said.output
    body = json.loads(out.read_text())
    one, four = body["shapes"]
    assert body["command"] == f"offramp bench vision --model {SMALL} --batch 1 --batch 4 --head conv --repeats 1"
    assert one["blocks_saved"] == pytest.approx(6 / 12) and four["blocks_saved"] == pytest.approx((9 + 6 + 3) / 48)
    for row in (one, four):
        assert 0 < row["ideal_seconds"] and 0 < row["heads_seconds"] and row["images_per_second_ideal"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0


@torch.no_grad()
def test_images_leave_as_planned():
    model = timm.create_model(SMALL, num_classes=3).eval()
    with offramp.attach(model, AT, "pooled_linear") as exits, offramp.enable(model, Evenly()) as run:
        model(torch.randn(8, 3, 32, 32))
        assert run.stats.exits == {3: 2, 6: 2, 9: 2, 12: 2}
        left = _left(run.stats.last_depths, exits.backbone.depth)
        planned = torch.tensor([*exits.at, 12])[Evenly().start(8, "cpu")["leaves"]]
    assert planned.tolist() == run.stats.last_depths.tolist()
    assert left == [8] * 3 + [6] * 3 + [4] * 3 + [2] * 3 and run.stats.blocks_run == sum(left)


@torch.no_grad()
def test_the_parts_of_a_model_are_all_of_it():
    model, seen = timm.create_model(SMALL, num_classes=3).eval(), []
    model.bn1.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    chain = adapt(model).chain()
    seen.clear()
    way = Parts(chain.blocks, model, 2)
    with way.ready():
        way(torch.randn(3, 3, 32, 32))
    assert seen == [2] and len(way.kept[0]) == 13 and all(s > 0 for s in way.kept[0])
    assert not any(m._forward_hooks for m in chain.blocks)


def peak_of(call):
    """The most bytes that torch's allocator gave out at one time while `call` ran, by its own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@torch.no_grad()
@pytest.mark.parametrize("head", ["pooled_linear", "conv"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_exits_take_no_more_memory_than_the_model(name, head):
    """The most is inside a block, where the batch is whole: what an exit holds beside a state is less than that."""
    options = {} if name == "resnet18" else {"img_size": 64}
    model = timm.create_model(name, **options).eval()
    images = torch.randn(8, 3, 64, 64)
    full = peak_of(lambda: model(images))
    offramp.attach(model, AT, head)
    with offramp.enable(model, Evenly()):
        early = peak_of(lambda: model(images))
    assert images.nbytes < early <= 1.05 * full


def test_unknown_models_are_refused():
    from rich.console import Console

    with pytest.raises(BadArgument, match="no model called resnet9000"):
        bench(Ask(("resnet9000",)), Console())
