"""Every diffusion transformer of diffusers that there are facts about: one stream or two, one list of blocks or two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp._registry import lookup, names
from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import BlockSpec, Call, Chain
from offramp.enable import Run, paused
from offramp.engine import LOGITS
from offramp.errors import BadArgument, UnsupportedModel
from offramp.gating import gate_of
from offramp.head import ExitHead, HeadContext
from offramp.options import refuse_generation
from offramp.policy import FULL, ExitPolicy, SchedulePolicy
from offramp_diffusers import _compat
from offramp_diffusers.denoise import Denoise
from offramp_diffusers.facts import ModelFacts, Stream, argument, model_facts, noise_level
from offramp_diffusers.head import DenoiserContext, DenoiserHead
from offramp_diffusers.policies.time_schedule import TimeSchedule, blocks

#: statistics of a prediction, and what is trained on them
NOT_HERE = LOGITS | {"gate"}


class Streams(Chain):
    """The blocks of one or several lists, each with its own facts about where the state stands.

    beside: what blocks read that a window from the middle would lack; "" for nothing.
    """

    def __init__(self, blocks: Sequence[nn.Module], streams: Sequence[Stream], beside: str = "") -> None:
        super().__init__(blocks, BlockSpec(streams[0].facts.argument, streams[0].place))
        self.streams, self.beside = list(streams), beside

    @contextmanager
    def window(self, start: int, stop: int, hidden: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Run only blocks start < i <= stop while the context lasts, from `hidden`; the last state is kept as "hidden".

        Raises `BadArgument` in the middle of models whose blocks read more than the state before them.
        """
        if self.beside and 0 < start < len(self.blocks):
            depth = len(self.blocks)
            raise BadArgument(
                f"window({start}, {stop}) starts in the middle, and blocks of this model also read {self.beside}, "
                f"which no window hands on; start at 0, or read a last state out: window({depth}, {depth}, hidden)"
            )
        with super().window(start, stop, hidden) as kept:
            yield kept

    def incoming(self, index: int, call: Call) -> Tensor:
        """Return the state that comes into block `index`."""
        return self.streams[index].read(call)

    def outgoing(self, index: int, output: Any) -> Tensor:
        """Return the state in what block `index` returned."""
        return self.streams[index].facts.state_of(output)

    def run(self, index: int, call: Call, hidden: Tensor | None = None) -> Any:
        """Run block `index`, on `hidden` instead of the incoming state."""
        return call.run() if hidden is None else self.streams[index].on(call, hidden).run()

    def skip(self, index: int, call: Call, hidden: Tensor | None = None) -> Any:
        """Return `hidden`, or the incoming state, as block `index` would, without running it."""
        stream = self.streams[index]
        return stream.skip(call) if hidden is None else stream.facts.pack(hidden, stream.text(call))


class TransformerBackbone(Backbone):
    """A diffusers transformer: its blocks in the order they run, and the module that reads the state after them."""

    #: whether states are images whose size changes from block to block: all rows of a call must then go equally deep
    image: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self.facts: ModelFacts = model_facts(model)
        children, kind = dict(model.named_children()), type(model).__name__
        self.names: list[str] = []
        for name in self.facts.lists:
            if not isinstance(children.get(name), nn.ModuleList):
                raise UnsupportedModel(f"{kind} should have its blocks in `{name}`; its parts: {', '.join(children)}")
            self.names += [f"{name}.{i}" for i in range(len(children[name]))]  # type: ignore[arg-type]
        if not isinstance(children.get(self.facts.reader), nn.Module):
            raise UnsupportedModel(
                f"{kind} has no `{self.facts.reader}` that reads the state after its blocks (its parts: "
                f"{', '.join(children)}); say which part does: declare({kind}, ModelFacts(lists=..., reader=...))"
            )
        if len(self.names) < 2:
            raise UnsupportedModel(f"{kind} has {len(self.names)} block, so there is no place for an exit")
        self.streams = [Stream.of(block) for block in self.blocks()]
        self.width = _width(model)
        #: whether calls carry a noise level that a schedule can go by
        self.timed = self.facts.time is not None

    def blocks(self) -> list[nn.Module]:
        """Return the blocks as they stand on the model now."""
        return [block for name in self.facts.lists for block in getattr(self.model, name)]

    def reader(self) -> nn.Module:
        """Return the module that reads the state after the last block."""
        return getattr(self.model, self.facts.reader)  # type: ignore[no-any-return]

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block."""
        return [Tap(name, i + 1, self.width, "batch token width") for i, name in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return a readout that hands on the state: the output layers need the noise level, so they are not copied."""
        kind, parts = type(self.model).__name__, dict(self.model.named_children())
        known = all(name in parts for name in self.facts.output)
        output = {name: parts[name] for name in self.facts.output} if known else {}
        norm, targets = _Conditioned(kind), self.targets()
        return DenoiserContext(norm, nn.Identity(), _same, self.width, self.width, None, kind, output, targets)

    def targets(self) -> Mapping[int, tuple[int, int]]:
        """Return what the state at a depth has to become to be read, (channels, times as large), where it changes."""
        return {}

    def resume(self, stop: int) -> int:
        """Return how many blocks come before those that run again after a stop: all, where none does.

        Deep blocks that read states of shallow ones run again after a stop before the middle, as many as have run:
        without them the answer of a U-ViT of 8 blocks was 2,000 times as wrong in noise, and 4 times with them.
        """
        return self.depth - stop if self.facts.long_skips and 2 * stop < self.depth else self.depth

    def stops(self) -> dict[int, int]:
        """Return the depths that a schedule can choose from, and how many blocks run at each: every depth, but of a U
        only those before its middle, and all."""
        found = {stop: stop + self.depth - self.resume(stop) for stop in range(1, self.depth + 1)}
        shaped = self.facts.long_skips
        return {d: n for d, n in found.items() if not shaped or self.resume(d) < self.depth or d == self.depth}

    def size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Return height and width of what the model, or a block, is called with, where states are images."""
        return None

    def chain(self) -> Chain:
        """Return the blocks, each with its facts."""
        beside = "the text's state" if any(s.facts.text is not None for s in self.streams) else ""
        if self.facts.long_skips:
            beside = "states of earlier blocks (long skips)"
        return Streams(self.blocks(), self.streams, beside)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return each image's whole state as one row: [batch, token, width] -> [batch, token * width]."""
        return hidden.flatten(1)

    def call(self, batch: Any) -> Any:
        """Run the model on a mapping of its own arguments."""
        if not isinstance(batch, Mapping):
            raise BadArgument(
                f"a batch for {type(self.model).__name__} is a mapping of its own arguments, e.g. "
                f'{{"hidden_states": latents, "timestep": t}}; got {type(batch).__name__}'
            )
        return self.model(**batch)

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return the states at `depths` and at the end, one row per token; `sample` says of which image it is."""
        with paused(self.model), self.chain().capture([*depths, self.depth]) as kept:
            self.call(batch)
        images, tokens, _ = kept[self.depth].shape
        rows = [kept[d].flatten(0, 1) for d in (*depths, self.depth)]
        return Observed(rows[:-1], rows[-1], sample=torch.arange(images).repeat_interleave(tokens))

    def noise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
        """Return the noise levels [rows or 1], 0 to 1000, of a call with these arguments; raises `BadArgument`."""
        given = argument(str(self.facts.time), type(self.model), args, kwargs)
        if given is None:
            raise BadArgument(
                f"this call of {type(self.model).__name__} has no `{self.facts.time}`, and the schedule goes by it; "
                f'pass it, or use a policy that does not: offramp.enable(model, "fixed", depth=...)'
            )
        return noise_level(self.facts, getattr(self.model, "config", {}), given)

    def drive(self, run: Run) -> Undo:
        """Let the state skip the remaining blocks; raises `BadArgument` for what a denoiser cannot do."""
        kind = type(self.model).__name__
        refuse_generation(run.options, f"{kind} answers once per call")
        if run.exits.at and not self._takes(head := type(run.exits[run.exits.at[0]])):
            fitting = (f'"{n}"' for n in names(ExitHead) if self._takes(lookup(ExitHead, n)))
            raise BadArgument(
                f"heads {run.exits.head!r} would not be used: at an exit of {kind} output layers read the state that a "
                f"head hands on, and {head.__name__} hands on none that they could; attach with head="
                f"{' or '.join(fitting)}"
            )
        if looks := _missing(run.policy):
            raise BadArgument(
                f"{type(run.policy).__name__} looks at {', '.join(looks)} of a prediction, and an exit of {kind} has "
                f"none: it hands the state to the model's own output layers. Policies that work here: "
                f"{', '.join(_fitting(run))}"
            )
        if "uncertainty" in run.policy.statistics() and run.exits.head != "uncertainty":
            raise BadArgument(
                f"the policy asks the heads how wrong they are, and heads {run.exits.head!r} cannot say; attach "
                f'head="uncertainty" and train them: offramp_diffusers.tune_heads.tune_uncertainty(model, ...)'
            )
        acts = self.image or any(getattr(run.exits[d], "acts", False) for d in run.exits.at)
        if isinstance(run.policy, SchedulePolicy) and acts:
            if bare := sorted(_stops(run.policy, self.depth) - {self.depth} - set(run.exits.at)):
                raise BadArgument(
                    f"the schedule stops at {bare}, where no head was attached (exits at {list(run.exits.at)}); attach "
                    f"one at each of its depths"
                )
        for block in self.blocks():
            if (cache := _compat.cached(block)) is not None:
                raise BadArgument(
                    f"{cache} is on {kind} already, and exits around it would keep it from ever seeing its last block: "
                    f"its residuals would be stale. Put it on top instead: model.disable_cache(), then "
                    f"offramp.enable(...), then model.enable_cache(...) (deep_cache: its context inside that of enable)"
                )
        return Denoise(run, self).install()

    def _takes(self, head: type[ExitHead]) -> bool:
        """Whether output layers can read what heads of a class hand on."""
        return issubclass(head, DenoiserHead) and head.image is self.image

    def flag(self) -> Mapping[str, Any] | None:
        """Return the dict under `early_exit` in the component's config, or None."""
        config = getattr(self.model, "config", None)
        found = config.get("early_exit") if isinstance(config, Mapping) else None
        return found if isinstance(found, Mapping) else None


class _Conditioned(nn.Module):
    """Stands where other models have a norm of the state alone; a head that wants it is told why there is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def _refuse(self) -> BadArgument:
        return BadArgument(
            f"this head starts from the model's own norm and projection, and those of {self.kind} also take the "
            f"timestep: there is no prediction from the state alone. At an exit the state goes on to the model's own "
            f'output layers: offramp.attach(model, at=[...], head="passthrough")'
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise self._refuse()

    def forward(self, state: Tensor) -> Tensor:
        """Return the state itself: what readers of the last state get where no head is asked."""
        return state


def _same(state: Tensor) -> Tensor:
    return state


def _fitting(run: Run) -> list[str]:
    """Return the names of the policies that look at no prediction, as they are by default."""
    found = []
    for name in names(ExitPolicy):
        try:
            example = lookup(ExitPolicy, name).example(run.exits.at, 0)
        except (BadArgument, TypeError):  # a third party's policy that cannot be made from nothing
            continue
        if not _missing(example) and not (isinstance(example, SchedulePolicy) and not example.timed):
            found.append(name)
    return found


def _stops(policy: SchedulePolicy, depth: int) -> set[int]:
    """Return the depths at which a schedule stops, of a model of `depth` blocks."""
    if isinstance(policy, TimeSchedule):
        return {blocks(given, depth) for given in policy.depths}
    return {policy.windows(float(level), depth)[0][1] for level in range(int(FULL) + 1)}  # a third party's: by asking


def _missing(policy: ExitPolicy) -> list[str]:
    """Return what a policy looks at that exits here do not have."""
    return sorted(s for s in policy.statistics() if s in NOT_HERE or gate_of(s))


def _width(model: Any) -> int:
    """Return the width of the state; raises `UnsupportedModel` where neither model nor config says it."""
    config = getattr(model, "config", {})
    for found in (getattr(model, "inner_dim", None), config.get("hidden_size")):
        if isinstance(found, int):
            return found
    try:
        return int(config["num_attention_heads"] * config["attention_head_dim"])
    except (KeyError, TypeError):
        raise UnsupportedModel(
            f"{type(model).__name__} does not say how wide its state is: no `inner_dim`, and no hidden_size or "
            f"num_attention_heads and attention_head_dim in its config"
        ) from None
