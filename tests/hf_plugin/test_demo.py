"""The demo and the benchmark, small, and the pieces they start from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp import cli
from offramp.errors import BadArgument, DamagedFile
from offramp_hf import bench_shapes, demo, prepare
from offramp_hf.prepare import Text, find_testbed, heldout, ids_of, pieces, windows

ASSETS = Path(__file__).parents[1] / "assets"
RUN = CliRunner()


def call(*words):
    return RUN.invoke(cli.build(), [str(w) for w in words], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def small():
    """The smallest settings that still run every step."""
    with pytest.MonkeyPatch.context() as patch:
        quick = {"own": 4, "own_tokens": 8, "steps": 3, "rows": 64, "windows": 100, "window": 24, "new_tokens": 12}
        patch.setattr(demo, "QUICK", replace(demo.QUICK, **quick))
        patch.setattr(demo, "SWEEP", 1)
        patch.setattr(demo, "ASSISTANT_LAYERS", (4,))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "pycode-5m")


@pytest.mark.slow
def test_demo_end_to_end_and_again(small, tmp_path, monkeypatch):
    done = call("demo", "lm", "--out", tmp_path, "--quick", "--prompts", 2, "--json", tmp_path / "copy.json")
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "report.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == body
    names = ["generate", "undrafted", "verified", "calibrated", "assistant_early_exit"]
    for key in ("rows", "plain_rows"):
        assert [row["name"] for row in body[key]] == names
        for row in body[key]:
            assert {"tokens_per_second", "speedup", "identical", "saved", "accepted", "drafted"} <= set(row)
            assert {"blocks_run", "blocks_full"} <= set(row)
            assert row["name"] == "calibrated" or row["identical"] is True
    assert {"certificate", "note", "trace", "text", "machine", "date", "command"} <= set(body)
    assert body["trace"]["rows"] == 100 and "confidence" in body["trace"]["curves"]
    assert all(len(one["tokens"]) for one in body["text"])
    page = (tmp_path / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("text", "exits", "accuracy", "certificate", "speed"))
    assert not body["fit"]["reused"]

    def refuse(*args, **kwargs):
        raise RuntimeError("fitted again")

    monkeypatch.setattr(offramp, "fit", refuse)
    again = call("demo", "lm", "--out", tmp_path, "--quick", "--prompts", 1)
    assert again.exit_code == 0, again.output
    second = json.loads((tmp_path / "report.json").read_text())
    assert second["fit"]["reused"] and second["certificate"] == body["certificate"]


@pytest.mark.slow
def test_fit_record_generate(tmp_path):
    model, data = ASSETS / "pycode-5m", tmp_path / "text.py"
    data.write_text((model / "heldout.txt").read_text()[:9000])
    exits, trace = tmp_path / "exits", tmp_path / "trace.safetensors"
    small = ("--at", "4,8", "--steps", 2, "--window", 32)
    done = call("fit", "lm", model, "--data", data, "--out", exits, *small, "--json", tmp_path / "fit.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "fit.json").read_text())["at"] == [4, 8]
    done = call("record", "lm", model, "--exits", exits, "--data", data, "--out", trace, "--window", 16)
    assert done.exit_code == 0, done.output
    made = offramp.Trace.load(trace)
    assert made.depths == (4, 8, 12) and made.targets is not None
    words = ("--prompt", "def f(x):", "--set", "threshold=0.5", "--verify", "--max-new-tokens", 6)
    done = call("generate", "lm", model, "--exits", exits, *words, "--json", tmp_path / "gen.json")
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "gen.json").read_text())
    assert len(body["text"][0]["tokens"]) == 6 and body["depths"] == [4, 8, 12]
    assert call("report", tmp_path / "gen.json").exit_code == 0


def test_exits_of_other_settings_are_not_reused(tmp_path):
    assert demo.FULL.fitting() != replace(demo.FULL, steps=1).fitting()
    assert demo.FULL.fitting() == replace(demo.FULL, threshold=0.9, windows=5, alpha=0.1).fitting()
    json.dumps(demo.FULL.fitting())


def test_errors_of_the_commands_are_clean(tmp_path):
    done = call("generate", "lm", tmp_path, "--exits", tmp_path, "--prompt", "x")
    assert done.exit_code == 1 and "is not a causal language model" in done.output and "Traceback" not in done.output
    done = call("fit", "lm", ASSETS / "pycode-5m", "--data", tmp_path / "no", "--out", tmp_path)
    assert done.exit_code == 1 and "cannot be read" in done.output


def test_the_testbed_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_testbed("pycode-5m") == ASSETS / "pycode-5m"
    with pytest.raises(BadArgument, match="offramp demo lm --model DIR"):
        find_testbed("pycode-9b")


def test_heldout_text_must_be_somewhere(tmp_path):
    assert heldout(tmp_path, ASSETS / "pycode-5m") == (ASSETS / "pycode-5m" / "heldout.txt").read_text()
    with pytest.raises(BadArgument, match="not trained on"):
        heldout(tmp_path, tmp_path)


def test_the_three_parts_share_nothing():
    text = Text.split(torch.arange(10_000))
    seen = [set(p.tolist()) for p in (text.fit, text.calibrate, text.evaluate)]
    assert sum(map(len, seen)) == 10_000 == len(set.union(*seen))
    prompts = text.prompts(20, 64)
    assert len(prompts) == 20 and all(p.shape == (1, 64) for p in prompts)
    assert set(torch.cat(prompts, 1)[0].tolist()) <= seen[2] and min(seen[2]) >= 5_000
    cut = text.windows(50, 24)
    assert cut.shape == (50, 24) and len(cut.unique()) == 50 * 24 and set(cut.unique().tolist()) <= seen[1]
    with pytest.raises(BadArgument, match="too short"):
        text.prompts(200, 64)


def test_the_defaults_leave_a_thousand_independent_rows(tokenizer):
    text = Text.split(ids_of(tokenizer, heldout(ASSETS / "pycode-5m", ASSETS)))
    assert len(text.windows(demo.WINDOWS, demo.WINDOW)) >= 1000 and len(text.prompts(demo.PROMPTS, 64)) >= 50


def test_pieces_add_up_also_over_broken_characters(tokenizer):
    text = "def f(x):\n    return 'é→ü'\n"
    ids = ids_of(tokenizer, text).tolist()
    assert len(pieces(tokenizer, ids)) == len(ids) and "".join(pieces(tokenizer, ids)) == text


def test_windows_need_enough_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n")
    with pytest.raises(BadArgument, match="less than one window of 64"):
        windows(tokenizer, [tmp_path / "a.txt"], 64)
    with pytest.raises(DamagedFile, match="cannot be read"):
        windows(tokenizer, [tmp_path / "b.txt"], 64)


def test_settings_scale_with_the_model():
    assert prepare.scaled((3, 6, 8), 12) == [3, 6, 8] and prepare.scaled((3, 6, 8), 24) == [6, 12, 16]
    assert prepare.scaled((3, 6, 8), 4) == [1, 2, 3] and prepare.scaled((3, 6, 8), 2) == [1]


@pytest.mark.slow
def test_shapes_small(tmp_path):
    words = ("--width", 64, "--blocks", 4, "--new-tokens", 4, "--repeats", 2)
    done = call("bench", "wide", *words, "--json", tmp_path / "w")
    assert done.exit_code == 0, done.output
    shapes = json.loads((tmp_path / "w").read_text())["shapes"]
    assert [s["name"] for s in shapes] == [f"fixed {d} {kv}" for d in (1, 2, 3) for kv in ("catch_up", "propagate")]
    assert all(s["blocks_saved"] > 0 and s["ideal_seconds"] > 0 for s in shapes)
    words = ("--width", 32, "--batch", 8, "--length", 8, "--repeats", 2)
    done = call("bench", "encoder", *words, "--json", tmp_path / "e")
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "e").read_text())["shapes"][0]
    mean = sum(bench_shapes.ENCODER_AT) / len(bench_shapes.ENCODER_AT)
    assert row["blocks_saved"] == pytest.approx(1 - mean / 12)
