"""What has to be known about a denoiser and its blocks, as data: built-in tables, diffusers' own, and the user's."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import Call
from offramp.errors import BadArgument, UnsupportedModel
from offramp.kernels.compact import compact
from offramp.policy import FULL
from offramp_diffusers._compat import block_metadata


@dataclass(frozen=True)
class BlockFacts:
    """How a block is called. state, text: place of the image's and the text's state in the returned tuple (state None:
    a bare tensor is returned; text None: no text comes back); argument, text_argument: what they are called on the way
    in; unbatched: arguments whose dimension 0 is not the batch (rotary tables), which are never cut into rows.
    """

    state: int | None = None
    text: int | None = None
    argument: str = "hidden_states"
    text_argument: str = "encoder_hidden_states"
    unbatched: frozenset[str] = frozenset({"image_rotary_emb", "rotary_emb", "freqs_cis"})

    def __post_init__(self) -> None:
        if self.state is None and self.text is not None:
            raise BadArgument(f"text={self.text} is a place in a returned tuple; say the place of the state too")
        if self.state is not None and self.state == self.text:
            raise BadArgument(f"state and text cannot both be at place {self.state} of what the block returns")

    def state_of(self, output: Any) -> Tensor:
        """Return the image's state in what the block returned."""
        return output if self.state is None else output[self.state]  # type: ignore[no-any-return]

    def pack(self, state: Tensor, text: Tensor | None) -> Any:
        """Return the two in the block's own order."""
        if self.state is None:
            return state
        if self.text is None:
            return (*[None] * self.state, state)
        return (state, text) if self.state < self.text else (text, state)


@dataclass(frozen=True)
class ModelFacts:
    """How a denoiser is built. lists: its chains of blocks, in the order they run; reader: the module that reads the
    state after the last block; time: the argument that holds the noise level, None where there is none; full: its value
    at pure noise; scaled_by: a number in the config that it comes multiplied with; rising: whether it rises towards the
    data instead; long_skips: whether deep blocks also read states of shallow ones; output: the modules with weights
    that run after the blocks, which exits may have copies of.
    """

    lists: tuple[str, ...]
    reader: str = "norm_out"
    time: str | None = "timestep"
    full: float = FULL
    scaled_by: str | None = None
    rising: bool = False
    long_skips: bool = False
    output: tuple[str, ...] = ("norm_out", "proj_out")


_TWO = ("transformer_blocks", "single_transformer_blocks")
_ONE = ("transformer_blocks",)
_UNET = ("down_blocks", "mid_block", "up_blocks")
#: by class name, so that no model has to be imported to look one up; noise levels as diffusers' pipelines pass them
MODELS: dict[str, ModelFacts] = {
    "DiTTransformer2DModel": ModelFacts(_ONE, output=("norm_out", "proj_out_1", "proj_out_2")),
    "PixArtTransformer2DModel": ModelFacts(_ONE),
    "SD3Transformer2DModel": ModelFacts(_ONE),
    "SanaTransformer2DModel": ModelFacts(_ONE, scaled_by="timestep_scale"),
    "WanTransformer3DModel": ModelFacts(("blocks",)),
    "FluxTransformer2DModel": ModelFacts(_TWO, full=1.0),
    "QwenImageTransformer2DModel": ModelFacts(_ONE, full=1.0),
    "HunyuanDiT2DModel": ModelFacts(("blocks",), long_skips=True),
    "HunyuanVideoTransformer3DModel": ModelFacts(_TWO),
    "CogVideoXTransformer3DModel": ModelFacts(
        _ONE, reader="norm_final", output=("norm_final", "norm_out", "proj_out")
    ),
    "LTXVideoTransformer3DModel": ModelFacts(_ONE),
    "Lumina2Transformer2DModel": ModelFacts(("layers",), full=1.0, rising=True, output=("norm_out",)),
    "AuraFlowTransformer2DModel": ModelFacts(("joint_transformer_blocks", "single_transformer_blocks"), full=1.0),
    "UNet2DModel": ModelFacts(_UNET, reader="conv_norm_out", long_skips=True, output=()),
    "UNet2DConditionModel": ModelFacts(_UNET, reader="conv_norm_out", long_skips=True, output=()),
    "UVit2DModel": ModelFacts(
        ("transformer_layers",), reader="project_from_hidden_norm", time=None,
        output=("project_from_hidden_norm", "project_from_hidden"),
    ),  # fmt: skip
}
#: block classes that diffusers' own table lacks
BLOCKS: dict[str, BlockFacts] = {
    "SanaTransformerBlock": BlockFacts(),
    "HunyuanDiTBlock": BlockFacts(),
    "Lumina2TransformerBlock": BlockFacts(unbatched=frozenset()),
    "AuraFlowJointTransformerBlock": BlockFacts(state=1, text=0),
    "AuraFlowSingleTransformerBlock": BlockFacts(),
    "LTXVideoTransformerBlock": BlockFacts(unbatched=frozenset()),
}


def declare(cls: type[nn.Module], facts: BlockFacts | ModelFacts) -> None:
    """Tell how a class of blocks, or a class of denoisers, is built: `declare(MyBlock, BlockFacts(state=1, text=0))`.

    It holds for this class and, for denoisers, for subclasses that have no facts of their own. Raises `BadArgument`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BadArgument(f"declare takes a class of modules first, not {cls!r}")
    if isinstance(facts, BlockFacts):
        BLOCKS[cls.__name__] = facts
    elif isinstance(facts, ModelFacts):
        MODELS[cls.__name__] = facts
    else:
        raise BadArgument(f"declare takes BlockFacts(...) or ModelFacts(...) for {cls.__name__}, not {facts!r}")


def model_facts(model: nn.Module) -> ModelFacts:
    """Return the facts of a denoiser; raises `UnsupportedModel` with what to declare."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS:
            return MODELS[cls.__name__]
    kind, lists = type(model).__name__, [n for n, m in model.named_children() if isinstance(m, nn.ModuleList)]
    raise UnsupportedModel(
        f"{kind} is a diffusers model that offramp has no facts about (its lists: {', '.join(lists) or 'none'}"
        f"; known: {', '.join(sorted(MODELS))}); say how it is built: from offramp_diffusers.facts import ModelFacts, "
        f'declare; declare({kind}, ModelFacts(lists=("{(lists or ["blocks"])[0]}",), reader="norm_out"))'
    )


def block_facts(block: nn.Module) -> BlockFacts:
    """Return the facts of a block; raises `UnsupportedModel` with what to declare."""
    cls = type(block)
    if cls.__name__ == "OptimizedModule":  # what torch.compile(block) returns
        return block_facts(block._orig_mod)  # type: ignore[arg-type]
    if cls.__name__ in BLOCKS:
        return BLOCKS[cls.__name__]
    found = block_metadata(cls)
    if found is None:
        raise UnsupportedModel(
            f"how {cls.__name__} is called is not known: neither diffusers' table of blocks nor offramp's has it; say "
            f"it: from offramp_diffusers.facts import BlockFacts, declare; declare({cls.__name__}, BlockFacts()) for a "
            f"block that returns the state alone, BlockFacts(state=0, text=1) for one that returns (state, text)"
        )
    return BlockFacts(*found)


def full_of(facts: ModelFacts, config: Any) -> float:
    """Return what this model is told at pure noise, or, where it counts up, for clean data."""
    return facts.full * (float(config[facts.scaled_by]) if facts.scaled_by else 1.0)


def noise_level(facts: ModelFacts, config: Any, given: Any) -> list[float]:
    """Return the noise level of every row, [rows or 1], from 0 to 1000.

    given: the argument as the model gets it: a number, [rows], or one per token [rows, tokens], of which the highest
    counts (tokens of a first frame that is given have 0). Raises `BadArgument` outside the model's range.
    """
    value = torch.as_tensor(given).detach()
    value = value.reshape(1) if value.dim() == 0 else value.flatten(1).amax(1) if value.dim() > 1 else value
    full = full_of(facts, config)
    # numbers of Python from here on: ten operations on a tensor of one number took 54 of the 90 microseconds that a
    # schedule cost a call
    told: list[float] = value.tolist()
    levels = [t / full * FULL for t in told]
    # bfloat16 rounds 999 to 1000; NaN fails this comparison too
    if not all(-0.5 <= level <= FULL + 2.5 for level in levels):
        raise BadArgument(
            f"{facts.time}={told} is outside this model's range of 0 to {full:g}, so no schedule over noise "
            f"levels applies; pass the time step as the scheduler gives it, or declare(..., ModelFacts(full=...))"
        )
    levels = [min(max(level, 0.0), FULL) for level in levels]
    return [FULL - level for level in levels] if facts.rising else levels


@cache  # asked at every call of a model, and a class's signature does not change
def parameters(cls: Any) -> dict[str, int]:
    """Return the place of every argument of the class's forward; `self` has -1."""
    return {name: place - 1 for place, name in enumerate(inspect.signature(cls.forward).parameters)}


def argument(name: str, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument by name, given by name or by place; None where it was left out."""
    if name in kwargs:
        return kwargs[name]
    place = parameters(cls).get(name, len(args))
    return args[place] if place < len(args) else None


@dataclass(frozen=True)
class Stream:
    """One block's facts beside where its arguments stand: what the hook on it needs at every call."""

    facts: BlockFacts
    place: int
    text_place: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, block: nn.Module, facts: BlockFacts | None = None) -> Stream:
        """Return the stream of a block, compiled or not; facts: None for those of its class; raises `UnsupportedModel`.
        """
        facts = block_facts(block) if facts is None else facts
        kind: Any = getattr(block, "_orig_mod", block)
        places = parameters(type(kind))  # type: ignore[arg-type]  # mypy: type[Any] is not Hashable
        if facts.argument not in places:
            raise UnsupportedModel(
                f"{type(kind).__name__} takes no argument {facts.argument!r} (it takes {', '.join(places)}); "
                f"declare it with BlockFacts(argument=...)"
            )
        return cls(facts, places[facts.argument], places.get(facts.text_argument, -1), tuple(places)[1:])

    def read(self, call: Call) -> Tensor:
        """Return the state that comes in."""
        return call.args[self.place] if len(call.args) > self.place else call.kwargs[self.facts.argument]  # type: ignore[no-any-return]

    def skip(self, call: Call) -> Any:
        """Return what came in as the block would return it, without running it."""
        if self.facts.state is None:
            return self.read(call)
        return self.facts.pack(self.read(call), self.text(call))

    def text(self, call: Call) -> Tensor | None:
        """Return the text's state that comes in, None where the block has none."""
        if self.facts.text is None:
            return None
        if 0 <= self.text_place < len(call.args):
            return call.args[self.text_place]  # type: ignore[no-any-return]
        return call.kwargs.get(self.facts.text_argument)

    def on(self, call: Call, state: Tensor) -> Call:
        """Return the same call on another state."""
        if len(call.args) > self.place:
            return replace(call, args=(*call.args[: self.place], state, *call.args[self.place + 1 :]))
        return replace(call, kwargs={**call.kwargs, self.facts.argument: state})

    def run_rows(self, call: Call, rows: Tensor) -> Any:
        """Run the block on `rows` (indices) of every batched argument; the others come back as they were."""
        state, text = self.read(call), self.text(call)
        size = state.shape[0]
        names = self.names
        args = [a if names[i] in self.facts.unbatched else cut(a, rows, size) for i, a in enumerate(call.args)]
        kwargs = {k: a if k in self.facts.unbatched else cut(a, rows, size) for k, a in call.kwargs.items()}
        output = call.original(*args, **kwargs)
        after = state.index_copy(0, rows, self.facts.state_of(output).to(state.dtype))
        if self.facts.text is not None and text is not None and output[self.facts.text] is not None:
            text = text.index_copy(0, rows, output[self.facts.text].to(text.dtype))
        return self.facts.pack(after, text)


def cut(value: Any, rows: Tensor, size: int) -> Any:
    """Return some rows of every tensor whose dimension 0 is the batch; of size 1 it is broadcast, nothing to cut, and a
    parameter has no rows, whatever its size."""
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.dim() and value.shape[0] == size > 1 else value
    if isinstance(value, dict):
        return {k: cut(v, rows, size) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(cut(v, rows, size) for v in value)
    return value


def without(rows: Tensor | None, gone: Tensor, batch: int) -> Tensor:
    """Return `rows` of a batch, None for all, less those that are gone; both are indices, in order."""
    on, count = torch.ones(batch, dtype=torch.bool, device=gone.device), batch
    if rows is not None:
        on, count = torch.zeros_like(on).index_fill(0, rows, True), rows.numel()
    return compact(on.index_fill(0, gone, False), count=count - gone.numel())[0]
