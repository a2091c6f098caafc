"""The command line: what it prints, what it writes, and what it says when something is wrong."""

import json
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

import offramp
from offramp import Trace, cli
from offramp._plugins import plugins
from offramp.errors import BadArgument

RUN = CliRunner()


@pytest.fixture
def call():
    app = cli.build()

    def invoke(*words):
        return RUN.invoke(app, [str(w) for w in words], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return invoke


@pytest.fixture
def trace(tmp_path):
    n = 600
    sure = torch.rand(n, 3).sort(1).values
    right = torch.rand(n, 3) < sure
    right[:, -1] = True
    made = Trace((2, 4, 6), {"top1": sure, "margin": sure, "entropy": 1 - sure}, torch.where(right, 1, 0), classes=9)
    made.save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def test_list_names_everything(call, tmp_path):
    done = call("list", "--json", tmp_path / "list.json")
    body = json.loads((tmp_path / "list.json").read_text())
    assert done.exit_code == 0 and body["names"]["ExitPolicy"] == offramp.names(offramp.ExitPolicy)
    assert set(body["names"]) == {"ExitPolicy", "ExitHead", "ExitGate", "Calibrator", "Loss", "DraftRule"}
    assert "confidence" in done.output and "toy" in body["plugins"] and "toy" in done.output


def test_list_names_a_broken_plugin(call, monkeypatch):
    monkeypatch.setitem(plugins().broken, "ghost", ImportError("no module named [ghost]"))
    done = call("list")
    assert done.exit_code == 0 and "ghost" in done.output and "no module named [ghost]" in done.output


@pytest.mark.parametrize("verb", list(cli.GROUPS))
def test_every_group_is_there(call, verb):
    assert verb in call("--help").output and call(verb, "--help").exit_code == 0


def test_calibrate_promises_and_writes(call, trace, tmp_path):
    done = call("calibrate", trace, "--alpha", 0.1, "--out", tmp_path / "cal.json", "--json", tmp_path / "said.json")
    assert done.exit_code == 0, done.output
    assert "With 95 % confidence" in done.output and "at most 10 %" in done.output and "600" in done.output
    made = offramp.Calibration.load(tmp_path / "cal.json")
    same = offramp.calibrate(Trace.load(trace), "confidence", alpha=0.1)
    assert made == same
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["certificate"]["alpha"] == 0.1 and said["outcome"]["agreement"] > 0.85


def test_calibrate_without_a_certificate_says_why(call, trace, tmp_path):
    done = call("calibrate", trace, "--alpha", 0.0001, "--json", tmp_path / "said.json")
    assert done.exit_code == 0 and "Uncertified" in done.output and "rows are needed" in done.output
    assert json.loads((tmp_path / "said.json").read_text())["certificate"] is None


def test_calibrate_takes_options_of_the_policy(call, trace):
    done = call("calibrate", trace, "--policy", "entropy", "--set", "normalised=true", "--alpha", 0.2)
    assert done.exit_code == 0 and "normalised=True" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("calibrate", "nowhere.safetensors"), "nowhere.safetensors cannot be read"),
        (("report", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_errors_are_one_message(call, words, said):
    done = call(*words)
    assert done.exit_code == 1 and done.output.startswith("error: ") and said in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "confidnce"), "did you mean 'confidence'?"),
        (("--alpha", "2"), "alpha must be a number between 0 and 1"),
        (("--set", "threshold"), "write e.g. --set threshold=0.9"),
        (("--set", "sharpness=2"), "has no option 'sharpness'"),
        (("--method", "hope"), "no Calibrator is called 'hope'"),
        (("--policy", "saturation"), "does not hold cosine"),
    ],
)
def test_bad_arguments_are_explained(call, trace, words, said):
    done = call("calibrate", trace, *words)
    assert done.exit_code == 1 and said in done.output


def test_an_error_of_another_family_is_not_hidden(trace, monkeypatch):
    app = cli.build()
    monkeypatch.setattr(offramp, "calibrate", lambda *a, **k: 1 / 0)
    assert isinstance(RUN.invoke(app, ["calibrate", str(trace)]).exception, ZeroDivisionError)


def test_report_rebuilds_the_page(call, tmp_path):
    body = {"format": 1, "certificate": None, "note": "uncertified: a reason"}
    (tmp_path / "run.json").write_text(json.dumps(body))
    done = call("report", tmp_path / "run.json", "--out", tmp_path / "x.html", "--json", tmp_path / "said.json")
    assert done.exit_code == 0 and "a reason" in (tmp_path / "x.html").read_text()
    assert json.loads((tmp_path / "said.json").read_text())["sections"] == ["certificate"]
    assert call("report", tmp_path / "run.json").exit_code == 0 and (tmp_path / "run.html").exists()


def test_a_plugin_adds_to_a_group(monkeypatch):
    def offramp_commands(app):
        cli.group(app, "demo").command("toy")(lambda: typer.echo("toy demo"))
        cli.group(app, "own").command("thing")(lambda: typer.echo("own thing"))

    found = plugins()
    module = ModuleType("extra")
    module.offramp_commands = cli_hook(offramp_commands)
    found.manager.register(module, "extra")
    monkeypatch.setitem(found.loaded, "extra", module)
    try:
        app = cli.build()
    finally:
        found.manager.unregister(name="extra")
    assert "toy demo" in RUN.invoke(app, ["demo", "toy"]).output
    assert "own thing" in RUN.invoke(app, ["own", "thing"]).output


def test_a_plugin_whose_commands_fail_is_named(monkeypatch, capsys):
    def offramp_commands(app):
        raise ValueError("broken commands")

    found = plugins()
    module = ModuleType("extra")
    module.offramp_commands = cli_hook(offramp_commands)
    found.manager.register(module, "extra")
    monkeypatch.setitem(found.loaded, "extra", module)
    try:
        app = cli.build()
    finally:
        found.manager.unregister(name="extra")
    said = " ".join(capsys.readouterr().err.split())
    assert "plugin extra: its commands are missing" in said and "broken commands" in said
    assert RUN.invoke(app, ["list"]).exit_code == 0


def cli_hook(function):
    """Mark a function as the implementation of a hook."""
    from offramp._hookspecs import hookimpl

    return hookimpl(function)


def test_options_are_json_or_text():
    given = ["a=0.5", "b=[1, 2]", "c=word", "d=true"]
    assert cli.options_from(given) == {"a": 0.5, "b": [1, 2], "c": "word", "d": True}
    with pytest.raises(BadArgument, match="is not NAME=VALUE"):
        cli.options_from(["=1"])


def test_json_is_strict():
    assert json.loads(cli.dump_json({1: [float("nan"), float("inf"), 2.0]})) == {"1": [None, None, 2.0]}


def test_depths_from_text():
    assert cli.depths_of("3,6,8") == [3, 6, 8] and cli.depths_of("0.25,0.5") == [0.25, 0.5]
    with pytest.raises(BadArgument, match="write e.g. --at 3,6,8"):
        cli.depths_of("3;6")
