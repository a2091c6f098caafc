"""Asking gates live, exit by exit, and the same over a trace."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.head import ask_in_turn
from offramp.policy import UNIT_GRID, Evidence
from offramp.testing.policies import check_no_wait, check_rows
from offramp.testing.toy import ToyModel

AT = (1, 2, 3, 4, 5)


@pytest.fixture
def data():
    return torch.randn(60, 3, 8)


@pytest.fixture
def exits():
    """Exits of a model whose blocks change the answer, with gates that say something."""
    model = ToyModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(6)
    exits = offramp.attach(model, AT, head="speculative", candidates=2, hidden=8)
    for depth in exits:
        torch.nn.init.normal_(exits[depth].exit_gate[-1].weight)
    with torch.no_grad():
        middle = above(exits, torch.randn(500, 3, 8)).logit().quantile(0.6, 0)
        for depth, value in zip(exits, middle, strict=True):
            exits[depth].exit_gate[-1].bias.sub_(value)  # each gate fires for four rows in ten
    return exits


def above(exits, data):
    """What every gate says of every row, [rows, exits]."""
    heads = [exits[d] for d in exits.at]
    states = exits.backbone.observe(data, exits.at).hidden
    return torch.stack(ask_in_turn(heads, states, heads[0](states[0]))[0], 1).sigmoid()


def live(exits, data, recent=None):
    """The evidence of every exit, as the executors give it."""
    states = exits.backbone.observe(data, exits.at).hidden
    out = []
    for i, (depth, hidden) in enumerate(zip(exits.at, states, strict=True)):
        first = exits[depth](hidden).detach() if i == 0 else None
        seen = Evidence(i, depth, i == 0, i == len(AT) - 1, hidden, first, 5, head=exits[depth], recent=recent)
        out.append(seen)
    return out


def test_rows_are_independent_and_nothing_waits(exits, data):
    policy = offramp.policy("speculative_gate", layers=[2, 4])
    with torch.no_grad():
        for one in (policy, offramp.policy("speculative_gate")):
            check_rows(one, live(exits, data))
            check_no_wait(one, live(exits, data))
        mixed = offramp.policy("speculative_gate", layers=[2], online=True, reach=0)
        check_no_wait(mixed, live(exits, data, [[4 + i % 2] for i in range(60)]))


def test_live_is_the_trace(exits, data):
    """One pass of the model exits where the replay says: a gate above the threshold and an answer among candidates."""
    model = exits.model
    trace = offramp.record(model, data)
    policy = offramp.policy("speculative_gate", threshold=0.45)
    replayed = offramp.simulate(trace, policy)
    full = model(data)
    model.calls()
    with offramp.enable(model, policy) as run:
        answers = model(data)
    assert run.stats.last_depths.tolist() == replayed.depths.tolist()
    assert answers.argmax(-1).tolist() == replayed.labels.tolist()
    assert len(run.stats.exits) > 2 and run.stats.saved == pytest.approx(replayed.saved)
    assert run.stats.blocks_run == sum(sum(rows) for rows in model.calls())  # what ran is what is counted
    assert torch.equal(model(data), full)
    fired = (above(exits, data) > 0.45) & (trace.stats["gate"][:, :-1] == 0)
    assert fired.any()  # gates that fired on an answer that is no candidate did not stop the row


def test_the_whole_head_runs_only_when_a_gate_fires(exits, data):
    calls = {d: 0 for d in AT}
    for depth in AT:

        def count(*args, depth=depth):
            calls[depth] += 1

        exits[depth].register_forward_hook(count)
    with offramp.enable(exits.model, "speculative_gate", threshold=0.999999):
        exits.model(data)
    assert calls == {1: 1, 2: 0, 3: 0, 4: 0, 5: 0}  # the first drafts the candidates


@torch.no_grad()
def test_the_change_is_since_the_exit_that_was_asked(exits, data):
    """With layers, a gate sees what changed since the gate before it in the schedule, not since the exit between."""
    policy = offramp.policy("speculative_gate", threshold=0.5, layers=[2, 4])
    seen, state = live(exits, data), {}
    stops = []
    for one in seen:
        stop, state = policy.step(state, one)
        stops.append(stop)
    assert not stops[0].any() and not stops[2].any() and not stops[4].any()
    carried = exits[1].draft(seen[0].hidden)
    first, p = exits[2].gate(seen[1].hidden, carried["candidates"], carried["p"])
    second, _ = exits[4].gate(seen[3].hidden, carried["candidates"], p)
    assert torch.equal(stops[1], first.sigmoid() > 0.5) and torch.equal(stops[3], second.sigmoid() > 0.5)
    assert stops[1].any() and stops[3].any()


@torch.no_grad()
def test_online_asks_near_where_a_row_stopped_last(exits, data):
    """Row by row: the schedule of one row is not that of its neighbour, and a batch decides as its rows alone do."""
    policy = offramp.policy("speculative_gate", threshold=0.2, layers=[1], online=True, recent=2, reach=1)
    recent = [[1, 5, 5], [3, 3, 2], [6], [], [4, 1, 1]]
    wanted = [{1, 4, 5}, {1, 2, 3, 4}, {1, 5}, {1}, {1, 2}]
    asked = [{s.depth for s in live(exits, data[:1], [one]) if any(policy.asked(s))} for one in recent]
    assert asked == wanted
    alone = []
    for row in range(5):
        state, mine = {}, []
        for one in live(exits, data[row : row + 1], [recent[row]]):
            stop, state = policy.step(state, one)
            mine.append(bool(stop))
        alone.append(mine)
    state, together = {}, []
    for one in live(exits, data[:5], recent):
        stop, state = policy.step(state, one)
        together.append(stop)
    assert torch.stack(together, 1).tolist() == alone
    assert any(any(mine[1:]) for mine in alone)


def test_nan_never_exits(exits, data):
    with torch.no_grad():
        exits[1].exit_gate[-1].bias.fill_(float("nan"))
    with offramp.enable(exits.model, "speculative_gate", threshold=0.0) as run:
        exits.model(data)
    assert 1 not in run.stats.exits and 2 in run.stats.exits


def test_the_replay_of_a_schedule_is_refused_with_the_reason(exits, data):
    trace = offramp.record(exits.model, data)
    with pytest.raises(BadArgument, match=r"another exit before them.*attach exits at \[2\] alone"):
        offramp.simulate(trace, "speculative_gate", layers=[2])
    with offramp.enable(exits.model, "speculative_gate", layers=[2], online=True):
        with pytest.raises(BadArgument, match="follows the tokens of a text.*leave online out"):
            exits.model(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold 1.5 is outside \[0, 1\]"),
        ({"threshold": 1}, r'threshold 1 is outside \[0, 1\[.*offramp.enable\(model, "never"\)'),
        ({"threshold": [0.5, 1.0]}, r"threshold 1 is outside \[0, 1\["),
        ({"threshold": float("nan")}, "nan is outside"),
        ({"layers": []}, r"layers=\[\] must be a list of depths"),
        ({"layers": 3}, "layers=3 must be a list of depths"),
        ({"online": True}, "online=True adds to layers=; without layers every exit is asked"),
        ({"layers": [2], "online": 1}, "online=1 must be True or False"),
        ({"layers": [2], "recent": 0}, "recent=0 must be a whole number"),
        ({"layers": [2], "reach": -1}, "reach=-1 must be a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("speculative_gate", **options)


def test_layers_that_are_no_exits(exits):
    with pytest.raises(BadArgument, match=r"layers \[6\] are no exits; exits are at \[1, 2, 3, 4, 5\]"):
        offramp.enable(exits.model, "speculative_gate", layers=[2, 6])


@pytest.mark.parametrize("wrapper", ["at_least", "any_of"])
def test_it_is_held_by_no_other_policy(wrapper):
    gate = {"policy": "speculative_gate", "threshold": 0.5}
    options = {"inner": gate, "depth": 2} if wrapper == "at_least" else {"policies": [gate]}
    with pytest.raises(BadArgument, match=f"{wrapper}: SpeculativeGate has the full head confirm every exit.*alone"):
        offramp.policy(wrapper, **options)


def test_ladder_is_the_common_grid_below_one():
    rungs = [p.threshold for p in offramp.policy("speculative_gate").ladder(AT, 5)]
    assert rungs == list(UNIT_GRID[1:])


def test_it_can_be_calibrated(exits, data):
    trace = offramp.record(exits.model, torch.randn(400, 3, 8))
    options = {"method": "fixed_sequence", "risk": "disagreement", "alpha": 0.4, "delta": 0.1}
    cal = offramp.calibrate(trace, "speculative_gate", **options)
    assert cal.certificate is not None and offramp.simulate(trace, cal).agreement >= 0.6
