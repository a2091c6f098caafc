"""The hook on a block: skip, capture, inject, select, and off again exactly."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from offramp.blocks import BlockSpec, Call, learn_spec, state_of, with_state
from offramp.errors import BadArgument, UnsupportedModel
from offramp.testing.toy import ToyBackbone, ToyModel


@pytest.fixture(params=["plain", "shared", "pair"])
def backbone(request):
    shape = {} if request.param == "plain" else {request.param: True}
    return ToyBackbone(ToyModel(**shape).eval())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def passing(index, call):
    return call.run()


def test_capture_is_what_the_blocks_say(backbone, x):
    model = backbone.model
    with backbone.chain().capture([0, 2, 6]) as kept:
        model(x)
    hidden = model.embed(x)
    assert torch.equal(kept[0], hidden) and set(kept) == {0, 2, 6}
    for i, block in enumerate(model.blocks):
        hidden = state_of(block(hidden, torch.ones(7, 3)))
        if i + 1 in kept:
            assert torch.equal(kept[i + 1], hidden)


def test_a_window_runs_its_blocks_only_and_continues_from_the_state(backbone, x):
    full = backbone.model(x)
    backbone.model.calls()
    with backbone.window(0, 2) as kept:
        backbone.model(x)
    assert sum(len(c) for c in backbone.model.calls()) == 2
    with backbone.window(2, 6, kept["hidden"]) as rest:
        out = backbone.model(torch.zeros_like(x))  # what comes in at the bottom does not matter any more
    assert sum(len(c) for c in backbone.model.calls()) == 4
    assert torch.equal(out, full)
    with backbone.window(6, 6, rest["hidden"]):
        assert torch.equal(backbone.model(torch.zeros_like(x)), full)
    assert backbone.model.calls() == [[] for _ in set(backbone.model.blocks)]


def test_a_window_from_the_bottom_takes_a_state_too(backbone, x):
    full = backbone.model(x)
    with backbone.window(0, 6, backbone.model.embed(x)):
        assert torch.equal(backbone.model(torch.zeros_like(x)), full)


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 7)])
def test_a_window_outside_the_model(backbone, bounds):
    with pytest.raises(BadArgument, match=r"window\(.*\) is outside the model: give 0 <= start <= stop <= 6"):
        with backbone.window(*bounds):
            pass
    assert "forward" not in backbone.model.blocks[0].__dict__


def test_select_cuts_every_batched_argument(backbone, x):
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    rows = torch.tensor([5, 0, 3])

    def cut(index, call):
        return call.run(call.hidden[rows] if index == 0 else None, rows=rows)

    full = backbone.model(x, mask)
    undo = backbone.chain().install(cut)
    assert torch.allclose(backbone.model(x, mask), full[rows], atol=1e-6)
    undo()


def test_skip_returns_the_blocks_own_shape():
    state = torch.zeros(2, 3)
    assert Call(print, (state,), {}, BlockSpec()).skip() is state
    assert Call(print, (state,), {}, BlockSpec(size=3)).skip() == (state, None, None)
    other = torch.ones(2, 3)
    assert Call(print, (), {"hidden_states": state}, BlockSpec(size=1)).skip(other) == (other,)
    assert with_state((state, 7), other) == (other, 7) and with_state(state, other) is other


def test_the_state_is_found_and_replaced_by_place_and_by_name():
    seen = []
    state, new, mask = torch.zeros(2), torch.ones(2), torch.arange(2)
    spec = BlockSpec("h", 1, None, frozenset({(0, 1), ("mask",)}))

    def original(*args, **kwargs):
        seen.append((args, kwargs))

    Call(original, ((5, mask), state), {}, spec).run(new, torch.tensor([1]))
    Call(original, ((5, mask),), {"h": state, "mask": mask, "n": None}, spec).run(new, torch.tensor([1]))
    (args, _), (_, kwargs) = seen
    assert args[0][0] == 5 and args[0][1].tolist() == [1] and args[1] is new
    assert kwargs["h"] is new and kwargs["mask"].tolist() == [1] and kwargs["n"] is None


class Pair(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


def test_select_keeps_named_tuples():
    spec = BlockSpec(batched=frozenset({("rope", 0)}))
    call = Call(lambda h, rope: rope, (torch.zeros(3),), {"rope": Pair(torch.arange(3), torch.arange(3))}, spec)
    rope = call.run(rows=torch.tensor([2]))
    assert isinstance(rope, Pair) and rope.cos.tolist() == [2] and rope.sin.tolist() == [0, 1, 2]


def test_undo_is_exact_and_may_be_called_twice(backbone, x, marks):
    before, full = marks(backbone.model), backbone.model(x)
    undo = backbone.chain().install(passing)
    assert "forward" in backbone.model.blocks[0].__dict__
    assert torch.equal(backbone.model(x), full)
    undo()
    undo()
    assert marks(backbone.model) == before and torch.equal(backbone.model(x), full)


def test_an_instance_forward_of_somebody_else_is_put_back(backbone, x):
    block = backbone.model.blocks[0]
    theirs = block.forward = lambda hidden, mask: type(block).forward(block, hidden, mask)
    undo = backbone.chain().install(passing)
    backbone.model(x)
    undo()
    assert block.__dict__["forward"] is theirs


def test_nested_installs_come_off_in_turn(backbone, x, marks):
    before, order = marks(backbone.model), []

    def noting(name):
        def handler(index, call):
            order.append(name)
            return call.run()

        return handler

    chain = backbone.chain()
    outer = chain.install(noting("outer"))
    between = marks(backbone.model)
    inner = backbone.chain().install(noting("inner"))
    backbone.model(x)
    assert order == ["inner", "outer"] * 6
    inner()
    assert marks(backbone.model) == between
    outer()
    assert marks(backbone.model) == before and not chain.hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_block_leaves_nothing(backbone, x, marks, error):
    before, full = marks(backbone.model), backbone.model(x)

    def failing(*args, **kwargs):
        raise error

    head = backbone.model.head
    for context in (backbone.window(0, 3), backbone.chain().capture([1])):
        handle = backbone.model.norm.register_forward_pre_hook(failing)
        with pytest.raises(error), context:
            backbone.model(x)
        handle.remove()
    assert marks(backbone.model) == before and torch.equal(backbone.model(x), full) and backbone.model.head is head


def test_shared_blocks_get_their_turns_and_reset_starts_anew(x):
    backbone, order = ToyBackbone(ToyModel(shared=True).eval()), []

    def handler(index, call):
        order.append(index)
        if len(order) == 3:
            raise RuntimeError
        return call.run()

    chain = backbone.chain()
    undo = chain.install(handler)
    with pytest.raises(RuntimeError):
        backbone.model(x)
    chain.reset()
    backbone.model(x)
    undo()
    assert order == [0, 1, 2, 0, 1, 2, 3, 4, 5]


def test_a_deep_copy_of_a_hooked_model_runs_its_own_blocks(backbone, x):
    backbone.hooked = backbone.chain()
    backbone.undo = backbone.hooked.install(passing)
    other = copy.deepcopy(backbone)
    full = backbone.model(x)
    backbone.model.calls()
    other.model.calls()
    for p in backbone.model.parameters():
        p.zero_()
    assert torch.equal(other.model(x), full)
    assert not sum(backbone.model.calls(), []) and sum(other.model.calls(), []) == [7] * 6
    other.undo()
    assert "forward" not in other.model.blocks[0].__dict__ and "forward" in backbone.model.blocks[0].__dict__


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_learn_spec_finds_the_batched_arguments_and_the_return_shape(pair, first):
    model = ToyModel(pair=pair).eval()
    spec, calls = learn_spec(list(model.blocks), lambda n: model(torch.randn(n, 4, 8)), "hidden", first)
    assert spec == BlockSpec("hidden", 0, 2 if pair else None, frozenset({(1,)}))
    assert len(calls) == 6 and "forward" not in model.blocks[0].__dict__
    assert sum(len(rows) for rows in model.calls()) == (2 if first else 12)


class Odd(nn.Module):
    """Blocks that do what `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for block in list(self.blocks)[:: -1 if self.how == "reversed" else 1]:
            if self.how == "no batch":
                x = block(x[0])[None].repeat(len(x), 1)
            else:
                x = block(x)[:, :3].repeat(1, 2)[:, :4] if self.how == "twice" and block(x) is not None else block(x)
        return x


@pytest.mark.parametrize(
    ("how", "reason"), [("reversed", "not run once each in order"), ("twice", "not run once"), ("no batch", "batch")]
)
def test_learn_spec_refuses_what_it_does_not_understand(how, reason):
    model = Odd(how)
    with pytest.raises(UnsupportedModel, match=reason):
        learn_spec(list(model.blocks), lambda n: model(torch.randn(n, 4)), "hidden")
    assert "forward" not in model.blocks[0].__dict__


def test_hooks_stand_before_blocks_that_were_compiled_in_place(backbone, x):
    """Whether they were compiled before or after; nothing of the hook is in a graph, and the undo is exact."""
    model, ran = backbone.model, []
    full = model(x)

    def handler(index, call):
        ran.append(index)
        return call.run()

    chain = backbone.chain()
    undo = chain.install(handler)
    for block in dict.fromkeys(model.blocks):
        block.compile(backend="eager")
    own = [block._compiled_call_impl for block in model.blocks]
    chain.reset()
    assert torch.allclose(model(x), full, atol=1e-6) and ran == list(range(6))
    assert all("forward" not in block.__dict__ for block in model.blocks)
    undo()
    assert [block._compiled_call_impl for block in model.blocks] == own
    ran.clear()
    undo = backbone.chain().install(handler)
    assert torch.allclose(model(x), full, atol=1e-6) and ran == list(range(6))
    undo()
    assert [block._compiled_call_impl for block in model.blocks] == own
    assert torch.allclose(model(x), full, atol=1e-6) and len(ran) == 6
