"""`offramp bench vision`: what it counts, on a model small enough to measure in a second."""

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

import offramp
from offramp.cli import build
from offramp.errors import BadArgument
from offramp_vision.bench import AT, Ask, Evenly, _gone, bench

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
        assert 0 < row["ideal_seconds"] < row["seconds_full"] and 0 < row["heads_seconds"] < row["seconds_full"]


@torch.no_grad()
def test_images_leave_as_planned():
    model = timm.create_model(SMALL, num_classes=3).eval()
    with offramp.attach(model, AT, "pooled_linear") as exits, offramp.enable(model, Evenly()) as run:
        model(torch.randn(8, 3, 32, 32))
        assert run.stats.exits == {3: 2, 6: 2, 9: 2, 12: 2}
        ran = sum(1 - share for share in _gone(run.stats.last_depths, exits.backbone.depth))
    assert run.stats.blocks_run == pytest.approx(8 * ran)


def test_unknown_models_are_refused():
    from rich.console import Console

    with pytest.raises(BadArgument, match="no model called resnet9000"):
        bench(Ask(("resnet9000",)), Console())
