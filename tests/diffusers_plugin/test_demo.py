"""The demo end to end, with too little training to mean anything; the report's parts; and the shapes of the bench."""

import json

import pytest
import torch

from offramp.errors import BadArgument
from offramp_diffusers import bench, demo, digits
from offramp_diffusers.commands import shapes_table, table
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
    assert rows["two_stage"]["saved"] > 0.4 and body["schedules"]["two_stage"] == [8, 2]
    assert sum(body["schedules"]["early, bolder"]) <= 10 * (0.3 * 8 + 0.7 * 2) + 1e-9
    assert len(body["runs"]) == 3 * len(rows) and table(body).row_count == len(rows)


def test_the_spread_of_seeds_stands_beside_the_differences(made):
    folder, body = made
    assert len(body["spread"]["frechet"]) == 1 + len(demo.OTHERS) and body["spread"]["relative"] > 0
    assert f"{body['spread']['relative']:.1%}" in (folder / "report.html").read_text()
    assert all(len(row["against_full_by_seed"]) == 3 for row in body["ways"])
    assert body["ways"][0]["against_full_by_seed"] == [0, 0, 0]


def test_the_distance_is_that_of_two_gaussians():
    make = torch.Generator().manual_seed(0)
    one = torch.randn(4000, 3, generator=make)
    assert digits.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert digits.frechet(one, one + 2) == pytest.approx(12, rel=1e-3)
    assert digits.frechet(one, one * 3) == pytest.approx(3 * 4, rel=0.1)


def test_every_way_of_one_seed_starts_from_the_same_noise():
    from diffusers import DDIMScheduler

    model, wanted = digits.make(2, 16).train(), digits.classes(4)
    one, two = (list(digits.steps(model, DDIMScheduler(), 2, wanted, 7)) for _ in range(2))
    assert len(one) == 2 and model.training and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_bench_measures_the_shape_it_is_asked_for():
    body = bench.run(["dit"], rounds=1, width=64, side=8)
    (row,) = body["rows"]
    assert body["command"] == "offramp bench diffusion --shape dit --rounds 1" and "diffusers" in body["machine"]
    assert row["name"] == "dit" and min(row[k] for k in ("full_ms", "early_ms", "short_ms", "never")) > 0
    assert shapes_table(body).row_count == 1 and {"overhead_us", "idle_us"} <= set(body)
    with pytest.raises(BadArgument, match="no shape is called sdxl; known: dit, pixart"):
        bench.run(["sdxl"])
