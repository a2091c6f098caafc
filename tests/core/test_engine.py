"""The single pass: rows leave the batch at their exits, and what comes out is what they said there."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

import offramp
from offramp import engine
from offramp.enable import paused
from offramp.kernels.confidence import PREDICTION
from offramp.policy import ExitPolicy
from offramp.testing.toy import ToyModel

AT = (2, 4, 5)


@dataclass(frozen=True)
class Plan(ExitPolicy):
    """Row i leaves at the exit with index plan[i]; no such exit: it runs to the end. Its state moves with the rows."""

    plan: tuple

    def start(self, batch, device):
        return {"plan": torch.tensor(self.plan[:batch])}

    def step(self, state, seen):
        if len(state["plan"]) != len(seen.hidden):
            raise RuntimeError("state and rows are no longer the same")
        return state["plan"] == seen.index, state


@dataclass(frozen=True)
class Logits(ExitPolicy):
    """Asks for the prediction itself and for nothing else."""

    needs: ClassVar[frozenset] = frozenset({"prediction"})

    def step(self, state, seen):
        return seen.prediction.argmax(-1) >= 0, state


@pytest.fixture(params=["plain", "shared", "pair"])
def model(request):
    return ToyModel(**({} if request.param == "plain" else {request.param: True})).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["tied", "linear"])
def exits(request, model):
    found = offramp.attach(model, AT, head=request.param)
    for i, depth in enumerate(found):  # heads that differ from each other and from the model's own readout
        found[depth].exit_norm.weight.mul_(1 + 0.3 * i).add_(0.1)
    return found


def expected(exits, x, plan, mask=None):
    """What each row should say, from one plain forward."""
    with exits.backbone.chain().capture(AT) as kept:
        out = exits.model(x, mask)
    exits.model.calls()
    heads = [exits[d](exits.backbone.pool(kept[d])) for d in AT] + [out]
    return torch.stack([heads[k][i] for i, k in enumerate(plan)])


PLAN = (1, 0, 3, 2, 1, 0, 3)


def test_every_row_says_what_its_exit_says_in_order(model, exits, x):
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    wanted = expected(exits, x, PLAN, mask)
    with offramp.enable(model, Plan(PLAN)) as run:
        out = model(x, mask)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert run.stats.last_depths.tolist() == [4, 2, 6, 5, 4, 2, 6]
    assert run.stats.exits == {2: 2, 4: 2, 5: 1, 6: 2} and run.stats.rows == 7


def test_blocks_run_is_what_really_ran(model, exits, x):
    model.calls()
    with offramp.enable(model, Plan(PLAN)) as run:
        model(x)
    calls = model.calls()
    assert sum(calls, []) == [7, 7, 5, 5, 3, 2]
    assert run.stats.blocks_run == 29 and run.stats.blocks_full == 42
    assert run.stats.saved == pytest.approx(1 - 29 / 42) and run.stats.depth_mean == pytest.approx(29 / 7)


def test_when_all_rows_are_gone_no_block_is_called(model, exits, x):
    plan = (0, 1, 1, 0, 0, 1, 0)
    wanted = expected(exits, x, plan)
    with offramp.enable(model, Plan(plan)) as run:
        out = model(x)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert sum(model.calls(), []) == [7, 7, 3, 3] and run.stats.blocks_run == 20


def test_when_no_row_leaves_the_output_is_bit_equal(model, exits, x):
    full = model(x)
    with offramp.enable(model, "never") as run:
        assert torch.equal(model(x), full)
    with offramp.enable(model, "confidence", threshold=1.0):
        assert torch.equal(model(x), full)
    assert run.stats.saved == 0 and run.stats.exits == {6: 7} and run.stats.depth_mean == 6


@pytest.mark.parametrize(
    ("policy", "options"), [("confidence", {"threshold": 0.0}), ("fixed", {"depth": 2}), ("patience", {"patience": 1})]
)
def test_a_row_with_nan_never_exits_and_is_counted(model, exits, x, policy, options):
    with offramp.enable(model, policy, **options) as run:
        clean = model(x)
    depths = run.stats.last_depths.clone()
    bad = x.clone()
    bad[3, 0, 0] = torch.nan
    with offramp.enable(model, policy, **options) as run:
        out = model(bad)
    assert run.stats.last_depths[3] == 6 and run.stats.nonfinite == len(AT)
    others = torch.arange(7) != 3
    assert torch.equal(run.stats.last_depths[others], depths[others])
    assert torch.allclose(out[others], clean[others], atol=1e-5) and out[3].isnan().all()


def test_a_broken_head_does_not_answer_for_a_policy_that_never_looks(model, exits, x):
    full = model(x)
    for p in exits[AT[0]].parameters():
        p.data.fill_(torch.nan)
    with offramp.enable(model, "fixed", depth=AT[0]) as run:
        out = model(x)
    assert run.stats.last_depths.min() > AT[0] and run.stats.nonfinite == len(x)
    assert out.isfinite().all() and out.shape == full.shape


def test_infinite_logits_of_one_row(model, exits, x):
    exits[2].forward = lambda h: torch.zeros(len(h), 5).index_fill(0, torch.tensor([0]), torch.inf)
    with offramp.enable(model, "confidence", threshold=0.1) as run:
        model(x)
    assert run.stats.last_depths.tolist() == [4, 2, 2, 2, 2, 2, 2] and run.stats.nonfinite == 1


def test_empty_batch(model, exits, x):
    with offramp.enable(model, "confidence", threshold=0.0) as run:
        model(x)
        assert model(x[:0]).shape == (0, 5)
    assert run.stats.rows == 7 and run.stats.last_depths.shape == (0,)
    assert run.stats.blocks_full == 42


@pytest.mark.parametrize("row", range(3))
def test_one_row(model, exits, x, row):
    plan = (row,)
    wanted = expected(exits, x[:1], plan)
    with offramp.enable(model, Plan(plan)) as run:
        assert torch.allclose(model(x[:1]), wanted, atol=1e-5)
    assert run.stats.blocks_run == AT[row] == sum(sum(model.calls(), []))


def medians(exits, x):
    """One threshold per exit, halfway between two rows' values, so that about half of the rows leave at each."""
    top = offramp.record(exits.model, x).stats["top1"][:, :-1].sort(0).values
    return ((top[3] + top[4]) / 2).tolist()


def test_rows_decide_alone_and_in_any_order(model, exits, x):
    thresholds = medians(exits, x)
    order = torch.randperm(7)
    with offramp.enable(model, "confidence", threshold=thresholds) as run:
        together = model(x)
        depths = run.stats.last_depths
        shuffled = model(x[order])
        assert torch.equal(run.stats.last_depths, depths[order])
        alone = []
        for i in range(7):
            alone.append(model(x[i : i + 1]))
            assert run.stats.last_depths.tolist() == [depths[i]]
    assert 1 < len(depths.unique())
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)


@pytest.mark.parametrize(("policy", "options"), [("patience", {"patience": 1}), ("saturation", {"threshold": 0.97})])
def test_policies_with_state_decide_as_in_the_simulation(model, exits, x, policy, options):
    x = torch.randn(40, 3, 8)
    wanted = offramp.simulate(offramp.record(model, x), offramp.policy(policy, **options)).depths
    with offramp.enable(model, policy, **options) as run:
        model(x)
    assert torch.equal(run.stats.last_depths, wanted) and len(wanted.unique()) > 1


def test_a_policy_may_ask_for_the_prediction_alone(model, exits, x):
    with offramp.enable(model, Logits()) as run:
        model(x)
    assert run.stats.exits == {2: 7}


def test_a_part_of_the_model_called_by_itself_runs_in_full(model, exits, x):
    """`features` does not go through the model's forward: nobody would put the exits' answers into what it returns."""
    whole = model.features(x)
    with offramp.enable(model, Plan(PLAN)) as run:
        model(x)
        assert torch.equal(model.features(x), whole) and run.stats.rows == 7 and run.stats.blocks_run == 29
        handle = model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        assert model.features(x[:2]).shape[0] == 2 and torch.equal(model.features(x), whole)
    assert run.stats.rows == 7


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_is_not_counted_and_the_next_is_right(model, exits, x, error):
    wanted = expected(exits, x, PLAN)

    def fail(*args):
        raise error

    with offramp.enable(model, Plan(PLAN)) as run:
        for part in (model.blocks[-1].norm, model.norm):
            handle = part.register_forward_pre_hook(fail)
            with pytest.raises(error):
                model(x)
            handle.remove()
        assert run.stats.rows == run.stats.blocks_run == run.stats.blocks_full == 0 and not run.stats.exits
        assert torch.allclose(model(x), wanted, atol=1e-5)
        assert run.stats.rows == 7 and run.stats.last_depths.tolist() == [4, 2, 6, 5, 4, 2, 6]


def test_paused_is_the_full_model(model, exits, x):
    full = model(x)
    with offramp.enable(model, "fixed", depth=2) as run:
        with paused(model):
            assert torch.equal(model(x), full)
        assert run.stats.rows == 0
        assert not torch.equal(model(x), full) and run.stats.rows == 7


def test_a_deep_copy_of_an_enabled_model_exits_by_itself(model, exits, x):
    with offramp.enable(model, "fixed", depth=2) as run:
        other = copy.deepcopy(model)
        said = model(x)
    model.calls()
    other.calls()
    theirs = other.__dict__["_offramp_run"]
    rows = run.stats.rows
    assert torch.equal(other(x), said)
    assert sum(other.calls(), []) == [7, 7] and not sum(model.calls(), [])
    assert run.stats.rows == rows and theirs is not run and theirs.stats.rows == 7
    theirs.disable()
    assert torch.equal(other(x), model(x)) and "_offramp_run" not in other.__dict__


def test_gradients_flow_through_the_exit_that_answered(model, exits, x):
    with torch.enable_grad(), offramp.enable(model, "fixed", depth=2):
        model(x).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0


class Waits(TorchFunctionMode):
    """What brings values from the device to the host, and so waits for it."""

    NAMES = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "unique", "cpu"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        at = args[1] if name in ("__getitem__", "__setitem__") else None
        if name in self.NAMES or (isinstance(at, torch.Tensor) and at.dtype == torch.bool):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin", "patience"])
def test_one_wait_for_the_device_per_decision(model, exits, x, monkeypatch, name):
    """And one at the end, for the depths. Nothing else that torch calls a read of a scalar, or a search, happens."""
    options = {"patience": {"patience": 1}, "entropy": {"threshold": 1.55}}.get(name, {"threshold": 0.25})
    looks = []
    monkeypatch.setattr(engine, "look", lambda *a, look=engine.look, **k: looks.append(1) or look(*a, **k))
    monkeypatch.setattr(offramp.Stats, "count", lambda self, depths: None)  # of what is on the host already
    with offramp.enable(model, name, **options):
        with Waits() as waits, profile() as seen:
            model(x)
    assert looks and waits.seen == ["tolist"] * len(looks) + ["cpu"]
    costly = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    assert not costly & {event.name for event in seen.events()}


def test_a_wait_would_be_seen():
    with Waits() as waits, profile() as seen:
        t = torch.ones(3)
        int(t.sum()), t[t > 0], t.nonzero()
    assert waits.seen == ["__int__", "__getitem__", "nonzero"]
    assert {"aten::_local_scalar_dense", "aten::nonzero"} <= {event.name for event in seen.events()}


@pytest.mark.parametrize("policy", ["fixed", "saturation", "confidence", "entropy", "margin", "energy"])
def test_exactly_what_the_policy_needs_is_computed(model, exits, x, monkeypatch, policy):
    """No statistic that it does not name; where it names none of a prediction, no head runs but for rows that leave."""
    options = {"fixed": {"depth": 4}}.get(policy, {"threshold": 0.5})
    asked, made, rows, real = [], [], [], engine.confidence

    def confidence(prediction, needs):
        asked.append(frozenset(needs))
        made.append(set(real(prediction, needs)))
        return real(prediction, needs)

    monkeypatch.setattr(engine, "confidence", confidence)
    for depth in AT:
        exits[depth].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    made_policy = offramp.policy(policy, **options)
    with offramp.enable(model, made_policy):
        model(x)
    wanted = made_policy.statistics() & PREDICTION
    assert set(asked) <= {wanted} and all(wanted <= one for one in made)
    if policy == "fixed":
        assert rows == [len(x)] and not asked
    elif policy == "saturation":
        assert not asked
    else:
        assert asked
