"""Exits and caches side by side, and one sentence about each pair that holds what was measured."""

import pytest

from offramp_diffusers import bench_caches, demo
from offramp_diffusers.commands import caches_table
from offramp_diffusers.ways import SETTINGS


def test_every_cache_is_measured_alone_and_with_exits():
    from rich.console import Console

    size = bench_caches.Size(rows=40, rounds=1, steps=4)
    body = bench_caches.run(Console(quiet=True), demo.QUICK, size)
    rows = {row["name"]: row for row in body["rows"]}
    assert set(rows) == {"full", "early", *SETTINGS, *(f"early + {c}" for c in SETTINGS)}
    assert rows["full"]["saved"] == 0 and rows["full"]["speedup"] == 1 and rows["early"]["saved"] > 0.2
    for cache in SETTINGS:
        assert rows[cache]["saved"] >= 0 and rows[f"early + {cache}"]["saved"] >= rows["early"]["saved"] - 1e-9
    assert caches_table(body).row_count == len(rows) and len(bench_caches.together(body["rows"])) == len(SETTINGS)


def row(name, speedup, setting=0.1, saved=0.5):
    return {"name": name, "speedup": speedup, "setting": setting, "saved": saved}


@pytest.mark.parametrize(
    ("both", "setting", "said"),
    [
        (2.0, 0.05, "is faster than either alone: 2.00x against 1.50x and 1.40x"),
        (1.45, 0.05, "is not faster than either alone: 1.45x against 1.50x and 1.40x; on exits only the setting 0.05"),
        (1.4, None, "no setting that was tried is as good as the full model"),
    ],
)
def test_the_sentence_says_which_is_faster(both, setting, said):
    rows = [row("full", 1.0), row("early", 1.4)]
    for cache in SETTINGS:
        rows += [row(cache, 1.5), row(f"early + {cache}", both, setting)]
    assert all(said in line for line in bench_caches.together(rows))
