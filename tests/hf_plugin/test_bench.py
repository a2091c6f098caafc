"""`offramp bench lm` on a given model: ways, settings, columns, memory, and the synthetic shape."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp import cli
from offramp.errors import BadArgument, DamagedFile
from offramp_hf import bench, bench_memory, bench_synthetic, bench_tide, clock, demo
from offramp_hf.bench import Ask
from offramp_hf.measure import Generate
from offramp_hf.prepare import load
from offramp_hf.prompts import batches, read_prompts
from offramp_hf.settings import Setting, parse_all

RUN = CliRunner()
CONFIDENT = '{"policy": "confidence", "threshold": 0.0, "verify": true, "draft": 2}'
#: ways that every bench of a language model measures first, in this order
OURS = ("generate", "never", "undrafted", "verified", "hybrid")


def call(*words):
    return RUN.invoke(cli.build(), [str(w) for w in words], env={"COLUMNS": "100", "NO_COLOR": "1"})


@pytest.fixture
def quick(monkeypatch):
    """No sweep over many layers: the framework's own drafting at one."""
    monkeypatch.setattr(demo, "ASSISTANT_LAYERS", (6,))


def bench_lm(folder, tmp_path, *words):
    given = ("--model", folder / "model", "--exits", folder / "exits", "--prompts", 2, "--new-tokens", 6)
    out = tmp_path / "bench.json"
    done = call("bench", "lm", *given, *words, "--json", out)
    assert done.exit_code == 0, done.output
    return {row["name"]: row for row in json.loads(out.read_text())["rows"]}, done.output


# ---- a model, prompts and settings ----------------------------------------------------------------------------------


def test_any_model_with_its_exits_prompts_and_settings(folder, tmp_path, quick):
    lossy = '{"policy": "fixed", "depth": 2, "kv": "propagate"}'
    words = ("--text", folder / "prompts.jsonl", "--assistant", folder / "model")
    rows, said = bench_lm(folder, tmp_path, *words, "--setting", CONFIDENT, "--setting", lossy)
    assert list(rows) == [
        *(*OURS, "assistant_early_exit", "prompt_lookup", "assisted"),
        *("confidence 0 verify draft 2", "fixed 2 propagate"),
    ]
    for name, row in rows.items():
        assert row["tokens"] == 12 and row["identical"] is (name != "fixed 2 propagate"), name
        assert {"tokens_per_second_quartiles", "speedup_quartiles", "bound", "realised", "block_share"} <= set(row)
        assert "peak_memory" not in row and name in said
    drafted = rows["confidence 0 verify draft 2"]
    assert drafted["drafted"] > 0 and drafted["of_bound"] == pytest.approx(drafted["speedup"] / drafted["bound"])
    early = rows["fixed 2 propagate"]
    assert early["saved"] == pytest.approx(0.5 * 10 / 12) and early["agreement"] < 1
    assert early["realised"] is not None and rows["generate"]["realised"] is None
    assert rows["assisted"]["saved"] is None and rows["assistant_early_exit"]["saved"] is not None
    assert rows["assistant_early_exit"]["layer"] == 2


def test_batches_leave_out_what_drafts_for_one_row(folder, tmp_path):
    rows, _ = bench_lm(folder, tmp_path, "--text", folder / "text.txt", "--batch", 2, "--quick", "--setting", CONFIDENT)
    assert list(rows) == [*OURS, "calibrated", "confidence 0 verify draft 2"]
    for row in rows.values():
        assert row["batch"] == 2 and row["tokens"] == 2 * 2 * 6
    assert all(rows[name]["identical"] for name in rows if name != "calibrated")
    assert 1 <= rows["confidence 0 verify draft 2"]["tokens_per_round"] <= 3


def test_sampled_text_is_not_called_identical_or_different(folder, tmp_path, quick):
    rows, said = bench_lm(folder, tmp_path, "--text", folder / "prompts.jsonl", "--sample", 0.7, "--setting", CONFIDENT)
    assert all(row["identical"] is None and row["agreement"] is None for row in rows.values())
    assert all(row["tokens"] == 12 for row in rows.values()) and "never" in said
    done = call("bench", "lm", "--model", folder / "model", "--sample", 0)
    assert done.exit_code == 1 and "no temperature" in done.output


@pytest.mark.slow
def test_fits_exits_and_keeps_the_keys_of_both_models(folder, tmp_path, quick, monkeypatch):
    small = {"own": 2, "own_tokens": 4, "steps": 1, "rows": 32, "windows": 60, "window": 12, "new_tokens": 4}
    monkeypatch.setattr(bench, "QUICK", bench.replace(demo.QUICK, **small))
    monkeypatch.setattr(bench, "find_testbed", lambda name: folder / "model")
    monkeypatch.setattr(bench, "heldout", lambda *where: (folder / "text.txt").read_text()[:20_000])
    done = call("bench", "lm", "--quick", "--prompts", 2, "--out", tmp_path, "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "b.json").read_text())
    names = [*OURS, "calibrated", "assistant_early_exit", "prompt_lookup"]
    assert [row["name"] for row in body["rows"]] == [row["name"] for row in body["plain_rows"]] == names
    assert {"calibration", "plain_calibration", "machine", "date", "command", "version"} <= set(body)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process(folder, tmp_path):
    build = bench.partial(bench_memory.from_disk, folder / "model", folder / "exits")
    model = build()
    ways = {"early": Generate("early", model, 4, offramp.policy("fixed", depth=1))}
    keep = torch.ones(2**28)  # a gigabyte in this process, none of it in theirs
    found = bench_memory.peaks(ways, torch.tensor([[3, 4]]), build)
    assert set(found) == set(ways) and all(2**27 < peak < keep.numel() * 4 for peak in found.values())
    assert bench_memory.high_water() > keep.numel() * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--setting", '{"policy": "confidense"}'), "confidense.*did you mean"),
        (("--setting", '{"policy": "fixed", "depth": 2, "depht": 3}'), "depht"),
        (("--setting", "nowhere.json"), "neither a JSON object nor a file"),
        (("--setting", '{"policy": "fixed", "depth": 2, "draft": "telepathy", "verify": true}'), "telepathy"),
        (("--setting", '{"policy": "fixed", "depth": 4}'), "depth 4 is deeper than every exit"),
        (("--setting", '{"policy": "fixed", "depth": 2, "exits": "elsewhere"}'), "share their exits"),
        (("--setting", CONFIDENT, "--setting", CONFIDENT), "given twice"),
        (("--text", "none.txt"), "cannot be read"),
        (("--batch", 9), "do not fill one batch of 9"),
        (("--batch", 2), "needs prompts of equal length"),
    ],
)
def test_what_cannot_be_measured_is_said_before_measuring(folder, words, said):
    given = ("--model", folder / "model", "--exits", folder / "exits", "--prompts", 2)
    done = call("bench", "lm", *given, "--text", folder / "prompts.jsonl", *words)
    flat = " ".join(done.output.split())
    assert done.exit_code == 1 and "Traceback" not in done.output and "continuations" not in flat
    assert re.search(said, flat), flat


def test_options_that_need_a_model(folder):
    done = call("bench", "lm", "--exits", folder / "exits")
    assert done.exit_code == 1 and "goes with a model" in done.output
    done = call("bench", "lm", "--model", folder / "model", "--text", folder / "prompts.jsonl")
    assert done.exit_code == 1 and "name fitted exits: --exits DIR" in " ".join(done.output.split())
    done = call("bench", "lm", "--synthetic", "24x1024", "--model", folder / "model")
    assert done.exit_code == 1 and "leave out --model" in " ".join(done.output.split())


def test_settings_have_short_names_and_come_from_files(tmp_path):
    flag = {"policy": "confidence", "threshold": [0.9, 0.25], "verify": True, "draft": 4, "exits": "here"}
    (tmp_path / "flag.json").write_text(json.dumps(flag))
    found = Setting.parse(str(tmp_path / "flag.json"))
    assert found.name == "confidence 0.9,0.25 verify draft 4" and found.exits == "here"
    assert found.enabled().items() >= {"verify": True, "draft": 4, "kv": "catch_up", "strict": False}.items()
    assert Setting.of({"policy": "entropy", "threshold": 2.0, "normalised": False}).name == "entropy 2"
    inner = [{"policy": "fixed", "depth": 2}, {"policy": "margin", "threshold": 0.5}]
    assert Setting.of({"policy": "any_of", "policies": inner}).name == "any_of policies=(fixed 2),(margin 0.5)"
    with pytest.raises(BadArgument, match="given twice"):
        parse_all(['{"policy": "never"}', '{"policy":"never"}'])


def test_prompts(folder):
    _, tokenizer = load(folder / "model")
    lines = read_prompts(tokenizer, folder / "prompts.jsonl", 3, 2)
    assert len(lines) == 3 and all(p.shape[0] == 1 and p.shape[1] <= 2 for p in lines)
    text = read_prompts(tokenizer, folder / "text.txt", 5, 8)
    assert [p.shape for p in text] == [(1, 8)] * 5 and [b.shape for b in batches(text, 2)] == [(2, 8)] * 2


@pytest.mark.parametrize("line", ["def f(x):", '{"text": "x"}', "3", '""'])
def test_a_bad_line_of_prompts_is_named(folder, tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(BadArgument, match="prompt 2 is neither"):
        read_prompts(load(folder / "model")[1], tmp_path / "p.jsonl", 9, 8)


# ---- realised / ideal -----------------------------------------------------------------------------------------------


def test_realised_is_one_when_all_skipped_blocks_pay():
    """Two prompts of 6 tokens, blocks 80 % of the time, half of the blocks after the prefill skipped: 40 % less."""
    row = {"prompts": 2, "batch": 1, "tokens": 12, "saved": 0.5 * 10 / 12, "speedup": 1 / 0.6}
    assert clock.realised(row, 0.8) == pytest.approx(1.0)
    assert clock.realised({**row, "speedup": 1.0}, 0.8) == 0.0
    assert clock.realised({**row, "saved": None}, 0.8) is None and clock.realised({**row, "saved": -0.1}, 0.8) is None


def test_block_share_leaves_out_the_prefill_and_what_is_around_blocks(monkeypatch):
    """Four steps of 10 ms in two blocks and 10 ms outside; the first step is the prefill: 30 of 80 ms."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(torch.nn.Module):
        def forward(self, x):
            now[0] += 0.005
            return x

    blocks = [Slow(), Slow()]

    def steps(n):
        def way(x):
            for _ in range(n):
                blocks[1](blocks[0](x))
                now[0] += 0.01

        return way

    share = clock.block_share(steps(4), steps(1), blocks, [torch.ones(1)] * 3)
    assert share == pytest.approx(30 / 80) and not any(b._forward_hooks for b in blocks)


# ---- the synthetic shape --------------------------------------------------------------------------------------------


def test_the_oracle_is_right_as_often_as_asked_and_sure_either_way():
    model = bench_synthetic.oracle_model("2x64", 1, 0.7)
    exits = bench_synthetic.find(model)
    known = bench_synthetic.known_tokens(32000, 0.7)
    assert known.float().mean().item() == pytest.approx(0.7, abs=0.02)
    ids = torch.arange(400, 464)[None]
    seen = exits.backbone.observe({"input_ids": ids}, (1,))
    full, early = exits.backbone.context().readout(seen.final), exits[1](seen.hidden[0])
    right = early.argmax(-1) == ids[0] + 1
    assert torch.equal(full.argmax(-1), ids[0] + 1) and torch.equal(right, known[ids[0] + 1])
    top = early.float().softmax(-1).amax(-1)
    assert top[~right].mean().item() == pytest.approx(top[right].mean().item(), rel=0.2)


@pytest.mark.slow
def test_synthetic_rows_are_labelled_and_lossless(tmp_path):
    words = ("--exit", 1, "--draft", 3, "--acceptance", 0.75, "--prompts", 3, "--new-tokens", 24)
    lossy = '{"policy": "fixed", "depth": 1}'
    done = call("bench", "lm", "--synthetic", "3x64", *words, "--setting", lossy, "--json", tmp_path / "s")
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "s").read_text())
    assert [r["name"] for r in body["rows"]] == ["generate", "oracle draft", "oracle draft, fixed 1"]
    assert body["label"] == "oracle draft" and "untrained" in body["title"] and body["title"][:4] in done.output
    drafted = body["rows"][1]
    assert drafted["identical"] and 0 < drafted["accepted"] < drafted["drafted"]
    assert body["acceptance"] == pytest.approx(0.75, abs=0.15) and not body["rows"][2]["identical"]
    assert body["rows"][2]["agreement"] < 1
    for row in (body["rows"][0], drafted):
        assert {"blocks", "heads", "cache", "rest"} <= set(row["parts_ms"]) and row["parts_ms"]["blocks"] > 0
    assert "policy" in drafted["parts_ms"] and "policy" not in body["rows"][0]["parts_ms"]


def test_shapes_have_names():
    assert bench_synthetic.shape_of("24x1024") == (24, 1024, 2816, 16, 4, 32000)
    assert bench_synthetic.shape_of("llama-7b-shape")[:2] == (32, 4096)
    for name in ("24x1000", "huge", "1x64", "24x"):
        with pytest.raises(BadArgument, match="llama-7b-shape, llama-1b-shape, or BLOCKSxWIDTH"):
            bench_synthetic.shape_of(name)
    with pytest.raises(BadArgument, match="no probability"):
        bench_synthetic.oracle_model("2x64", 1, 1.5)


# ---- tide-inference -------------------------------------------------------------------------------------------------

FAKE = '''
"""Takes what the package's documentation shows, and nothing else."""
from dataclasses import dataclass
from pathlib import Path
import torch

@dataclass
class TIDEConfig:
    checkpoint_interval: int = 4
    min_layers: int = 8
    calibration_dataset: str = "wikitext"

def calibrate(model, tokenizer, config=None, save_path="./router.pt", device=None):
    Path(save_path).write_text(f"{config.checkpoint_interval} {config.min_layers}")

class TIDE:
    def __init__(self, model, router_path, config=None, use_cuda_kernels=True):
        self.model, self.router = model, Path(router_path).read_text()
        model.register_forward_hook(lambda *args: None)

    def generate(self, input_ids, max_new_tokens=512, temperature=1.0, top_k=50, top_p=0.9):
        return self.model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
'''
DATASETS = """
from pathlib import Path

def load_dataset(path, split, streaming):
    return iter(Path(path, "train.jsonl").read_text().splitlines())
"""


def test_without_the_package_there_is_no_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "TIDE", None)
    monkeypatch.setattr(bench_tide.importlib.util, "find_spec", lambda name: None)
    assert not bench_tide.installed()


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, text in (("TIDE", FAKE), ("datasets", DATASETS)):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in ("TIDE", "datasets"):
        sys.modules.pop(name, None)


def test_the_package_is_a_row_of_its_own(folder, tmp_path, quick, package):
    words = ("--text", folder / "prompts.jsonl", "--out", tmp_path / "out")
    rows, _ = bench_lm(folder, tmp_path, *words)
    row = rows["tide-inference"]
    assert row["tokens"] == 12 and row["identical"] and row["bound"] is None
    assert row["blocks_run"] == row["blocks_full"] and row["saved"] == 0.0
    assert (tmp_path / "out" / "tide-model" / "router.pt").read_text() == "1 1"  # a router per block, none before


def test_its_hooks_are_on_a_model_of_its_own_with_the_same_weights(folder, tmp_path, package):
    model, tokenizer = load(folder / "model")
    way = bench_tide.tide(model, tokenizer, "x" * 600, tmp_path / "tide", 4, None)
    assert way.model._forward_hooks and not model._forward_hooks
    assert all(a is b for a, b in zip(way.model.parameters(), model.parameters(), strict=True))


def test_text_that_the_package_cannot_read_is_an_error(folder, tmp_path, package):
    (package / "datasets" / "__init__.py").write_text("def load_dataset(*a, **k):\n    raise OSError('broken')\n")
    model, tokenizer = load(folder / "model")
    with pytest.raises(DamagedFile, match="nothing to train on: broken"):
        bench_tide.tide(model, tokenizer, "x" * 600, tmp_path / "tide", 4, None)


def test_defaults_of_the_question_are_those_of_the_command():
    assert Ask() == Ask(prompts=50, folder=Path("demo")) and Ask(quick=True).fitting() == demo.QUICK
    assert Ask(new_tokens=7).fitting().new_tokens == 7
