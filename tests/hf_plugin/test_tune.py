"""`offramp tune`: the search, what it drops, and the config that it writes."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp import cli
from offramp.attach import RECORD
from offramp.enable import parse_flag
from offramp.errors import BadArgument, OfframpError, UnknownName
from offramp_hf import pareto, tune
from offramp_hf.pareto import Point, corner, dominates, front, hopeless
from offramp_hf.prepare import load
from offramp_hf.tune_space import POLICIES, Space

RUN = CliRunner()
SMALL = ("--count", 2, "--new-tokens", 4, "--prompt-tokens", 8)


def call(folder, *words):
    given = ("--model", folder / "model", "--exits", folder / "exits", "--prompts", folder / "text.txt")
    words = ("tune", *given, *SMALL, *words)
    return RUN.invoke(cli.build(), [str(w) for w in words], env={"COLUMNS": "100", "NO_COLOR": "1"})


class Chosen:
    """A trial whose suggestions are given; anything else is the first or the lowest."""

    number = 0

    def __init__(self, **given):
        self.given, self.asked = given, []

    def suggest_categorical(self, name, choices):
        self.asked.append(name)
        return self.given.get(name, choices[0])

    def suggest_float(self, name, low, high):
        self.asked.append(name)
        return self.given.get(name, low)

    suggest_int = suggest_float


@pytest.fixture
def space(folder):
    def make(lossless=True, policies=POLICIES):
        model, _ = load(folder / "model")
        return Space(offramp.load(model, folder / "exits"), policies, lossless)

    return make


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lossless", [True, False])
def test_writes_a_flag_that_the_model_takes(folder, tmp_path, lossless):
    out, said = tmp_path / "early_exit.json", tmp_path / "said.json"
    done = call(folder, "--trials", 6, "--lossless" if lossless else "--any", "--out", out, "--json", said)
    assert done.exit_code == 0, done.output
    flag, body = json.loads(out.read_text()), json.loads(said.read_text())
    assert body["early_exit"] == flag and len(body["trials"]) == 6 and "beats these" in done.output
    model, _ = load(folder / "model")
    ids = torch.tensor([[3, 4, 5]])
    full = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.config.early_exit = flag
    with offramp.enable(model):
        early = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert not lossless or torch.equal(early, full)
    for trial in body["trials"]:
        assert trial["setting"]["verify"] or not lossless
        assert trial["dropped"] is (len(trial["ratios"]) < 2)
    assert all(a == 1.0 for t in body["trials"] for a in t["agreements"] if t["setting"]["verify"])
    points = [(p["speed"], p["agreement"]) for p in body["front"]]
    assert points == sorted(points, key=lambda p: -p[0]) and max(p[1] for p in points) == 1.0


def test_never_is_written_when_nothing_is_faster(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.Trials, "measure", lambda *args: ([0.5, 0.5], [1.0, 1.0]))
    done = call(folder, "--trials", 2, "--out", tmp_path / "flag.json")
    assert done.exit_code == 0 and "no setting was faster" in done.output
    flag = json.loads((tmp_path / "flag.json").read_text())
    assert flag == {"policy": "never", "exits": str(folder / "exits")}


def test_what_is_written_agrees_enough(folder, tmp_path, monkeypatch):
    """Three lossy points; the fastest is below the agreement asked for."""
    found = iter([([3.0, 3.0], [0.5, 0.5]), ([2.0, 2.0], [0.9, 0.9]), ([1.5, 1.5], [0.99, 0.99])])
    monkeypatch.setattr(tune.Trials, "measure", lambda *args: next(found))
    words = ("--any", "--trials", 3, "--agreement", 0.8, "--out", tmp_path / "flag.json", "--json", tmp_path / "said")
    assert call(folder, *words).exit_code == 0
    body = json.loads((tmp_path / "said").read_text())
    assert [p["speed"] for p in body["front"]] == [3.0, 2.0, 1.5, 1.0]
    want = {k: v for k, v in body["front"][1]["flag"].items() if k != "at" and v is not None}
    assert {k: v for k, v in body["early_exit"].items() if k != "exits"} == want


def test_the_time_limit_ends_the_search(folder, tmp_path):
    out = tmp_path / "said"
    done = call(folder, "--trials", 500, "--minutes", 0.001, "--out", tmp_path / "flag.json", "--json", out)
    assert done.exit_code == 0 and len(json.loads(out.read_text())["trials"]) < 20


def test_without_optuna_the_line_to_run_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = call(folder, "--out", tmp_path / "flag.json")
    assert done.exit_code == 1 and "pip install 'offramp-hf[tune]'" in " ".join(done.output.split())
    with pytest.raises(OfframpError, match="searches with optuna"):
        tune.optuna()


def test_errors_are_clean(folder, tmp_path):
    done = call(folder, "--policy", "confidense", "--out", tmp_path / "f")
    assert done.exit_code == 1 and "did you mean 'confidence'" in " ".join(done.output.split())
    done = call(folder, "--policy", "never", "--out", tmp_path / "f")
    assert done.exit_code == 1 and "no threshold" in done.output
    done = call(folder, "--agreement", 95, "--out", tmp_path / "f")
    assert done.exit_code == 1 and "no share of tokens" in done.output and not (tmp_path / "f").exists()


# ---- the space ------------------------------------------------------------------------------------------------------


def test_thresholds_are_rungs_of_the_policys_ladder_one_per_exit(space):
    made = space()
    flag = made.suggest(Chosen(exit_3=True, exit_2=False, bold_confidence_1=1.0, bold_confidence_3=0.0))
    assert flag == {"policy": "confidence", "threshold": [0.0, 1.0], "verify": True, "draft": None, "at": [1, 3]}
    fixed = made.suggest(Chosen(shallow=2, exit_3=False, policy="fixed", draft_of_one="fixed", fixed_length=5))
    draft = {"rule": "fixed", "length": 5}
    assert fixed == {"policy": "fixed", "depth": 2, "verify": True, "draft": draft, "at": [2]}
    for one in (flag, fixed):
        parse_flag({k: v for k, v in one.items() if k != "at"})


def test_lossy_settings_are_suggested_only_when_allowed(space):
    trial = Chosen()
    space().suggest(trial)
    assert "verify" not in trial.asked and "kv" not in trial.asked
    lossy = space(lossless=False).suggest(Chosen(verify=False, kv="propagate"))
    assert lossy["verify"] is False and lossy["kv"] == "propagate" and "draft" not in lossy


def test_every_policy_with_a_ladder_can_be_searched(space):
    names = []
    for name in offramp.names(offramp.ExitPolicy):
        try:
            made = space(policies=(name,))
        except BadArgument:
            continue
        flag = made.suggest(Chosen(exit_2=True, exit_3=True))
        with made.only(flag["at"]) as exits:
            made_of = tune.Setting.of({k: v for k, v in flag.items() if k != "at"})
            assert made_of.policy(exits).config()["policy"] == name
        names.append(name)
    assert {"confidence", "margin", "entropy", "fixed", "patience"} <= set(names)


def test_a_part_of_the_exits_has_the_same_weights_and_is_saved_beside_the_flag(space, folder, tmp_path):
    made = space()
    model = made.model
    with torch.no_grad():
        for state in made.states.values():
            for tensor in state.values():
                tensor.add_(1.0)
    flag = {"policy": "fixed", "depth": 3, "at": [1, 3], "verify": True, "draft": None}
    found = made.written(flag, str(folder / "exits"), tmp_path / "best.json")
    assert found == {"policy": "fixed", "depth": 3, "verify": True, "exits": str(tmp_path / "best-exits")}
    assert RECORD not in model.__dict__
    with offramp.load(model, found["exits"]) as exits:
        assert exits.at == (1, 3)
        for depth in exits.at:
            assert all(torch.equal(v, made.states[depth][k]) for k, v in exits[depth].state_dict().items())
    whole = made.written({**flag, "at": [1, 2, 3]}, str(folder / "exits"), tmp_path / "best.json")
    assert whole["exits"] == str(folder / "exits")


def test_a_setting_that_the_exits_do_not_fit_is_a_dropped_trial(space):
    made = tune.Trials(space(policies=("patience",)), [torch.tensor([[3, 4]])], 4)
    trial = Chosen(exit_2=False, exit_3=False, policy="patience")
    with pytest.raises((tune.optuna().TrialPruned, BadArgument)):
        made.objective(trial)
    assert made.pruned == 1 and "at least 2" in made.kept[0]["unfit"]


def test_rules_for_drafts_are_searched_with_their_options(space):
    made = space()
    assert set(made.rules) == set(offramp.names(offramp.DraftRule))
    assert set(made.rules) - set(made.rules_of_one) == {"del"}  # it chooses between exits
    found = made.draft(Chosen(draft="confident", confident_length=7, confident_eta=0.3), 2)
    assert found == {"rule": "confident", "length": 7, "eta": 0.3}


# ---- the optimistic corner ------------------------------------------------------------------------------------------


def test_front():
    points = [Point(1.0, 1.0, {}), Point(2.0, 0.9, {}), Point(1.5, 0.8, {}), Point(2.0, 0.9, {}), Point(0.9, 1.0, {})]
    assert [(p.speed, p.agreement) for p in front(points)] == [(2.0, 0.9), (2.0, 0.9), (1.0, 1.0)]
    assert dominates(2, 1, 1, 1) and not dominates(1, 1, 1, 1) and not dominates(2, 0.5, 1, 1)


def test_the_corner_is_above_what_was_seen_and_closes_in():
    few, many = corner([1.0, 1.2, 1.4], [0.8, 1.0, 0.9]), corner([1.0, 1.2, 1.4] * 10, [0.8, 1.0, 0.9] * 10)
    assert 1.2 < many[0] < few[0] and 0.9 < many[1] < few[1] < 1.0
    assert corner([1.0, 1.1, 1.2], [1.0] * 3)[1] == 1.0 and corner([1.1], [0.5])[0] == float("inf")


def test_only_a_dominated_corner_is_hopeless():
    known = [Point(1.0, 1.0, {}), Point(1.5, 1.0, {})]
    slow, fast, unsure = [0.8, 0.81, 0.79], [1.6, 1.7, 1.6], [0.5, 1.9, 0.8]
    assert hopeless(slow, [1.0] * 3, known) and not hopeless(fast, [0.1] * 3, known)
    assert not hopeless(unsure, [1.0] * 3, known)
    assert not hopeless(slow[: pareto.WARMUP - 1], [1.0] * 2, known)
    assert hopeless([1.4, 1.41, 1.4], [0.1] * 3, known) and not hopeless([1.6, 1.6, 1.61], [0.1] * 3, known)


def test_a_hopeless_trial_stops_measuring(space, monkeypatch):
    made = tune.Trials(space(), [torch.tensor([[3, 4]])] * 6, 4, points=[Point(1000.0, 1.0, {})])
    with pytest.raises(tune.optuna().TrialPruned, match="after 3 prompts"):
        made.objective(Chosen(exit_2=False, exit_3=False))
    assert made.kept[0]["dropped"] and len(made.kept[0]["ratios"]) == 3 and made.pruned == 1
    assert RECORD not in made.space.model.__dict__


def test_unknown_policies_are_refused(space):
    with pytest.raises(UnknownName, match="confidence"):
        space(policies=("confidense",))
