"""The benchmark of the kernels: its table, its files, and its words for what is not there."""

import json

import pytest
import torch
from typer.testing import CliRunner

from offramp import bench_kernels, cli
from offramp.errors import UnknownName


def call(*words):
    return CliRunner().invoke(cli.build(), ["bench", *map(str, words)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_row_for_every_implementation(monkeypatch):
    monkeypatch.delenv("OFFRAMP_KERNELS", raising=False)
    done = call("kernels", "--quick", "--repeats", 1, "--op", "head_stats")
    assert "head_stats 1 x 64" in done.output and "head_stats, cpp 1 x 64" in done.output


def test_results_are_kept_by_machine_and_date(tmp_path):
    words = ("kernels", "--quick", "--repeats", 1, "--op", "compact")
    done = call(*words, "--results", tmp_path, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "a.json").read_text())
    row = body["rows"][0]
    assert row["op"] == "compact" and row["speedup"] == pytest.approx(row["ms"]["mask"] / row["ms"]["kernel"])
    assert body["copy_gb_per_s"] > 0.1 and body["threads"] == torch.get_num_threads() and row["shape"] in done.output
    call("overhead", "--executor", "single_pass", "--depth", 4, "--width", 16, "--repeats", 1, "--results", tmp_path)
    (file,) = tmp_path.glob("*-cpu-*.json")
    kept = json.loads(file.read_text())
    assert set(kept) == {"kernels", "overhead"} and kept["kernels"] == body


def test_turns_are_taken_and_the_first_is_not_counted():
    order = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert set(bench_kernels.seconds(ways, 2)) == {"a", "b"} and "".join(order) == "ab" + "ab" + "ba"


def test_what_does_not_exist_is_said():
    with pytest.raises(UnknownName, match="did you mean 'compact'"):
        bench_kernels.measure("compct", True, 1, "cpu", False, print)
    if not torch.cuda.is_available():
        assert "--device cuda is not on this machine; choose one of: cpu" in call("kernels", "--device", "cuda").output
