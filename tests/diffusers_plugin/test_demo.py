"""The demo end to end, with too little training to mean anything; the report's parts; and the bench."""

import json

import pytest
import torch

from offramp.errors import BadArgument
from offramp_diffusers import bench, demo, digits
from offramp_diffusers.commands import table
from offramp_diffusers.page import summary


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from rich.console import Console

    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.run(folder, True, Console(quiet=True))


def test_the_demo_writes_one_page_that_needs_nothing_else(made):
    folder, body = made
    page = (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["ways"][0]["name"] == "full"
    assert page.count("data:image/png;base64,") == len(body["ways"]) and "http" not in page.replace("xmlns", "")
    assert body["command"] == "offramp demo diffusion --quick" and "diffusers" in body["machine"]
    assert "no ImageNet FID" in summary(body) and "<script" not in page


def test_what_the_demo_counts_is_what_ran(made):
    _, body = made
    rows = {row["name"]: row for row in body["ways"]}
    assert rows["full"]["saved"] == 0 and rows["full"]["speedup"] == 1
    assert rows["early"]["saved"] >= 0.2 and rows["early"]["saved"] == rows["early, untuned"]["saved"]
    assert rows["early + first_block_cache"]["saved"] >= rows["early"]["saved"]
    assert len(body["runs"]) == 3 * len(rows) and table(body).row_count == len(rows)


def test_the_distance_is_that_of_two_gaussians():
    make = torch.Generator().manual_seed(0)
    one = torch.randn(4000, 3, generator=make)
    assert digits.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert digits.frechet(one, one + 2) == pytest.approx(12, rel=1e-3)
    assert digits.frechet(one, one * 3) == pytest.approx(3 * 4, rel=0.1)


def test_ways_of_one_seed_start_from_the_same_noise():
    from diffusers import DDIMScheduler

    model = digits.make(2, 16).eval()
    one, two = (digits.sample(model, DDIMScheduler(), 2, 4, 7)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_the_bench_measures_the_shape_it_is_asked_for():
    body = bench.run(["dit"], rounds=1, width=64, side=8)
    (row,) = body["rows"]
    assert body["command"] == "offramp bench diffusion --shape dit --rounds 1" and "diffusers" in body["machine"]
    assert row["name"] == "dit" and row["full_ms"] > row["short_ms"] > 0 and body["overhead_us"] < 200
    with pytest.raises(BadArgument, match="no shape is called sdxl; known: dit, pixart"):
        bench.run(["sdxl"])
