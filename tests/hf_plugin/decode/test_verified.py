"""Lossless decoding: whatever policy, threshold, end tokens and batch, the framework's own tokens; what ran is
counted.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import offramp
from offramp.gating import gate_of
from offramp.policy import ExitPolicy

NEW = 24


@dataclass(frozen=True)
class Always(ExitPolicy):
    """Accepts every draft."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def step(self, state, seen):
        return seen.every(True), state


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.mark.parametrize("draft", [None, 1, 5])
def test_any_threshold(model, one, three, draft):
    wanted, wanted3 = greedy(model, one), greedy(model, three)
    offramp.attach(model, at=[2, 4])
    drafted = []
    for threshold in (0.0, 0.06, 0.08, 0.12, (1.0, 0.0), 1.0):
        with offramp.enable(model, "confidence", threshold=threshold, verify=True, draft=draft) as run:
            assert torch.equal(greedy(model, one), wanted), threshold
            assert torch.equal(greedy(model, three), wanted3), threshold
            drafted.append(run.stats.drafted)
    assert drafted[0] > drafted[3] >= drafted[-1] == 0 < drafted[4]


#: policies that ask no exit, and one of denoisers
OTHERS = ("position_schedule", "time_schedule", "uncertainty")


@pytest.mark.parametrize("name", [n for n in offramp.names(ExitPolicy) if n not in OTHERS])
def test_any_policy(model, one, three, name):
    wanted, wanted3 = greedy(model, one), greedy(model, three)
    policy = offramp.policy(name, **example(name))
    # a readout like any, with a gate inside it, and the gate beside the exits that the policy reads
    gate = next(filter(None, map(gate_of, policy.statistics())), None)
    exits = offramp.attach(model, at=[1, 2, 4], head="speculative", gate=gate)
    for depth in exits:
        torch.nn.init.normal_(exits[depth].exit_gate[-1].weight, std=0.01)
    if gate is not None:
        torch.nn.init.normal_(exits.gate_module.get_parameter(type(exits.gate_module).zero), std=0.01)
    with offramp.enable(model, policy, verify=True, draft=4) as run:
        assert torch.equal(greedy(model, one), wanted)
        assert torch.equal(greedy(model, three), wanted3)
        assert (run.stats.drafted > 0) == (name != "never")


def example(name):
    """Options under which each policy accepts some drafts."""
    inner = {"policy": "confidence", "threshold": 0.05}
    wraps = {"all_of": "policies", "any_of": "policies", "at_least": "inner", "decaying": "inner", "tempered": "inner"}
    if name in ("all_of", "any_of"):
        return {wraps[name]: [inner, {"policy": "margin", "threshold": 0.02}]}
    if name in wraps:
        more = {"at_least": {"depth": 2}, "decaying": {"length": NEW}, "tempered": {"temperature": 1.5}}[name]
        return {wraps[name]: inner, **more}
    own = {"fixed": {"depth": 2}, "patience": {"patience": 1}, "never": {}, "saturation": {"threshold": 0.5}}
    own |= {"window": {"inner": "confidence", "low": 0.02, "high": 0.05}, "budgeted": {"inner": inner, "closed": [1]}}
    high = {"entropy": 4.0, "energy": 0.0, "agreement": 10.0}
    return own.get(name, {"threshold": high.get(name, 0.05)})


def test_ragged_rows_keep_their_own_number(model, three):
    """Rows accept different numbers in one round and stay exact; each also runs alone to the same tokens."""
    wanted = greedy(model, three)
    offramp.attach(model, at=[2])
    with offramp.enable(model, Always(), verify=True, draft=4) as run:
        assert torch.equal(greedy(model, three), wanted)
        depths = run.stats.last_depths.view(3, NEW)
        assert len({tuple(row) for row in depths.tolist()}) == 3
        assert 0 < run.stats.accepted < run.stats.drafted


@pytest.mark.parametrize("at", range(2, 12))
def test_end_token_anywhere_in_a_draft(make, one, three, at):
    """Each token of the text in turn is the end token: at every place of a draft, and one row after the other."""
    model = make()
    text = greedy(model, one)[0, 9:].tolist()
    end = text[at]
    short, short3 = greedy(model, one, eos_token_id=end), greedy(model, three, eos_token_id=end)
    assert short[0, -1] == end and short.shape[1] <= 9 + at + 1
    offramp.attach(model, at=[2])
    with offramp.enable(model, Always(), verify=True, draft=5) as run:
        assert torch.equal(greedy(model, one, eos_token_id=end), short)
        assert len(run.stats.last_depths) == short.shape[1] - 9
        padded = {"input_ids": torch.cat([torch.zeros(1, 2).long(), one["input_ids"]], 1)}
        padded["attention_mask"] = (padded["input_ids"] > 0).long()
        assert torch.equal(greedy(model, padded, eos_token_id=end)[:, 2:], short)
        assert torch.equal(greedy(model, three, eos_token_id=[end, 3]), greedy_plain(run, three, [end, 3]))
        assert torch.equal(greedy(model, three, eos_token_id=end), short3)


def greedy_plain(run, batch, end):
    run.paused = True
    try:
        return greedy(run.model, batch, eos_token_id=end)
    finally:
        run.paused = False


def test_rows_end_at_different_times(model, three):
    """A row that has ended is padded and the others are not disturbed, for as long as they go on."""
    plain = greedy(model, three, new=40)
    ends = [int(plain[0, 15]), int(plain[1, 30])]
    wanted = greedy(model, three, new=40, eos_token_id=ends)
    lengths = (wanted[:, 11:] != 0).sum(-1)
    assert lengths.min() < 15
    offramp.attach(model, at=[2])
    for draft in (None, 1, 7):
        with offramp.enable(model, Always(), verify=True, draft=draft) as run:
            assert torch.equal(greedy(model, three, new=40, eos_token_id=ends), wanted)
            assert run.stats.tokens == int(lengths.sum())


def watch(model):
    """Count rows through the MLP of every block: what really ran."""
    seen = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: seen.extend([i] * len(args[0])))
    return seen


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize("options", [{"verify": True, "draft": 4}, {"verify": True}, {}, {"kv": "propagate"}])
def test_blocks_run_is_what_ran(model, request, rows, options):
    batch, seen = request.getfixturevalue(rows), watch(model)
    offramp.attach(model, at=[2, 4])
    with offramp.enable(model, "confidence", threshold=0.08, **options) as run:
        greedy(model, batch)  # the first call also probes how blocks can be called
        run.stats.reset()
        seen.clear()
        greedy(model, batch)
        assert run.stats.blocks_run == len(seen)
        assert run.stats.blocks_full == 6 * NEW * len(batch["input_ids"])
        assert run.stats.rounds * len(batch["input_ids"]) == seen.count(5)
        assert run.stats.saved == 1 - len(seen) / run.stats.blocks_full
        if options.get("kv") != "propagate":
            assert not run.stats.projected
        else:
            assert run.stats.projected > 0


def test_early_blocks_are_not_run_again(model, one):
    """Verification runs the deep blocks only: shallow blocks see each token that was drafted or committed once."""
    tokens = [0] * 6
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: tokens.__setitem__(i, tokens[i] + args[0].shape[1]))
    offramp.attach(model, at=[2])
    with offramp.enable(model, Always(), verify=True, draft=4) as run:
        greedy(model, one)
        run.stats.reset()
        tokens[:] = [0] * 6
        greedy(model, one)
        s = run.stats
        # the prompt, then per round the newest token and its drafts, in every block alike: deep ones all at once
        assert tokens == [9 + s.rounds - 1 + s.drafted] * 6
        assert s.tokens == s.accepted + s.rounds == NEW
        assert s.blocks_run == 6 + 2 * (s.rounds - 1 + s.drafted) + 4 * (s.rounds - 1)


@pytest.mark.parametrize("verify", [True, False])
def test_nan_does_not_exit(model, one, three, verify):
    """A head with NaN weights is never trusted and is counted; the text is the full model's."""
    wanted, wanted3 = greedy(model, one), greedy(model, three)
    exits = offramp.attach(model, at=[2, 4])
    for depth in exits:
        exits[depth].exit_norm.weight.data.fill_(float("nan"))
    for name, options in (("confidence", {"threshold": 0.0}), ("fixed", {"depth": 2}), ("patience", {"patience": 1})):
        with offramp.enable(model, name, **options, verify=verify, draft=3 if verify else None) as run:
            assert torch.equal(greedy(model, one), wanted)
            assert torch.equal(greedy(model, three), wanted3)
            assert run.stats.exits == {6: 4 * NEW}
            assert run.stats.nonfinite > 0 or (verify and "Fixed" in repr(run))  # drafts that nobody looked at


def test_half_precision_after_attach(model, one):
    offramp.attach(model, at=[2])
    with offramp.enable(model, Always(), verify=True, draft=3) as run:
        greedy(model, one)
        model.to(torch.bfloat16)
        run.stats.reset()
        made = greedy(model, one)
        assert run.stats.accepted > 0 and made.shape == (1, 9 + NEW)
        model.to(torch.float64)
        run.paused = True
        wanted = greedy(model, one)
        run.paused = False
        assert torch.equal(greedy(model, one), wanted)


def test_a_copy_has_its_own_run(model, one):
    wanted = greedy(model, one)
    offramp.attach(model, at=[2])
    run = offramp.enable(model, Always(), verify=True, draft=3)
    greedy(model, one)
    rounds = run.stats.rounds
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin, one), wanted)
    mine = twin.__dict__["_offramp_run"]
    assert mine is not run and mine.stats.rounds == 2 * rounds and run.stats.rounds == rounds
    run.disable()
    assert "generate" not in model.__dict__ and "generate" in twin.__dict__
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(greedy(twin, one), wanted)
    mine.disable()
    assert "generate" not in twin.__dict__
    assert torch.equal(greedy(twin, one), wanted)


@pytest.mark.slow
def test_a_long_text(model, one):
    """Past the tables of 256 positions and the buffers of 256 slots, with drafts on both sides of their ends."""
    wanted = greedy(model, one, new=540)
    offramp.attach(model, at=[2])
    with offramp.enable(model, Always(), verify=True, draft=5) as run:
        assert torch.equal(greedy(model, one, new=540), wanted)
        assert 0 < run.stats.accepted < run.stats.drafted
