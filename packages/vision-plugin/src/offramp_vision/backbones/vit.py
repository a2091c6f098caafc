"""timm vision transformers, and whatever of timm is built like them: one chain of blocks, then norm, pooling, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backbone import Tap
from offramp.blocks import BlockSpec, Call, Chain, learn_spec
from offramp.errors import UnsupportedModel
from offramp.head import HeadContext
from offramp.record import evaluating
from offramp_vision.backbones._images import ImageBackbone, near, noise, same
from offramp_vision.backbones._places import places
from offramp_vision.layouts import TOKENS


class VitBackbone(ImageBackbone):
    """A timm model with `blocks` on a [batch, token, width] state and one `head` that reads what is pooled from it."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        _structure(model)
        self.names = [f"blocks.{name}" for name, _ in model.blocks.named_children()]  # type: ignore[union-attr]
        seen = _probe(model)
        self.spec, self.width, self.classes = seen.spec, seen.state.shape[-1], seen.logits.shape[-1]
        self.reading = _reading(model, seen)
        self.place = places(model, TOKENS, tuple(seen.state.shape[1:]), seen.size)

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block."""
        return [Tap(name, i + 1, self.width, TOKENS, *self.place) for i, name in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return the norms that follow the pooling, and the model's own classifier."""
        norm = READINGS[self.reading].norm(self.model)
        return HeadContext(norm, self.model.head, same, self.width, self.classes)  # type: ignore[arg-type]

    def chain(self) -> Chain:
        """Return the blocks; a shared relative position is not cut with the batch."""
        return Chain(list(self.model.blocks), self.spec)  # type: ignore[arg-type]

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what the head reads, the class token or pooled tokens: [batch, token, width] -> [batch, width]."""
        return READINGS[self.reading].pool(self.model, hidden)

def _structure(model: nn.Module) -> None:
    """Raise `UnsupportedModel` with the reason when the parts that this backbone needs are not there."""
    children = dict(model.named_children())
    reason = None
    if not isinstance(children.get("blocks"), (nn.Sequential, nn.ModuleList)):
        reason = f"it has no chain of blocks called `blocks` (its parts: {', '.join(children)})"
    elif len(children["blocks"]) < 2:  # type: ignore[arg-type]
        reason = "it has fewer than 2 blocks, so there is no place for an exit"
    elif not isinstance(children.get("norm"), nn.Module) or not hasattr(model, "forward_head"):
        reason = f"it has no `norm` and `forward_head` after its blocks (its parts: {', '.join(children)})"
    elif isinstance(children.get("head"), (nn.Identity, type(None))):
        reason = "it has no classifier (`head`), so an exit has nothing to answer; build it with num_classes=..."
    if reason is not None:
        raise UnsupportedModel(f"{type(model).__name__} is a timm model, but {reason}")


class _Seen(NamedTuple):
    """What one probe of 2 images saw: the state after the blocks, what the head read of it, and what it said."""

    spec: BlockSpec
    state: Tensor
    read: Tensor
    logits: Tensor
    size: tuple[int, ...]


def _probe(model: nn.Module) -> _Seen:
    """Run the model on 2 and on 3 images of noise, first block only; raises `UnsupportedModel` with the reason."""
    blocks, reads = list(model.blocks), []  # type: ignore[arg-type]
    outputs: list[Any] = []
    watch = model.head.register_forward_pre_hook(lambda _, args: reads.append(args[0]))  # type: ignore[union-attr]
    try:
        with evaluating(model), torch.no_grad():
            spec, calls = learn_spec(blocks, lambda batch: outputs.append(model(noise(model, batch))), "x", first=True)
            _check(calls, outputs[0], reads, blocks)
            state = calls[1].hidden  # the first block has run, the others returned what they were given
            return _Seen(spec, state, reads[0], outputs[0], tuple(noise(model, 1).shape[-2:]))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{type(model).__name__} is a timm model, but {error}") from None
    except Exception as error:  # whatever a model may raise: it cannot be called as an image classifier
        raise UnsupportedModel(
            f"{type(model).__name__} is a timm model, but calling it on images failed ({type(error).__name__}: {error})"
        ) from error
    finally:
        watch.remove()


def _check(calls: list[Call], logits: Any, reads: list[Any], blocks: list[nn.Module]) -> None:
    shapes = {tuple(call.hidden.shape) for call in calls}
    if len({type(block) for block in blocks}) > 1:
        raise UnsupportedModel(f"its blocks differ ({', '.join(sorted({type(b).__name__ for b in blocks}))})")
    if len(shapes) > 1 or calls[0].hidden.dim() != 3:
        raise UnsupportedModel(f"its blocks do not work on one [batch, token, width] state (shapes: {sorted(shapes)})")
    if len(reads) != 2:
        raise UnsupportedModel(f"its `head` is called {len(reads) / 2:g} times per forward, not once")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UnsupportedModel("it does not return logits [batch, classes]")


class _Reading(NamedTuple):
    """One way from a state to the head's input: what `pool` takes from it, then the norm that a head starts from."""

    pool: Callable[[Any, Tensor], Tensor]
    norm: Callable[[Any], nn.Module]


def _fc_norm(model: Any) -> nn.Module:
    found = getattr(model, "fc_norm", None)
    return found if isinstance(found, nn.Module) else nn.Identity()


def _norms(model: Any) -> nn.Module:
    """Return the norm and, where there is one, the norm after pooling: each token's norm is its own, so it commutes."""
    after = _fc_norm(model)
    return model.norm if isinstance(after, nn.Identity) else nn.Sequential(model.norm, after)


def _first(model: Any, hidden: Tensor) -> Tensor:
    return hidden[:, 0]


def _mean(model: Any, hidden: Tensor) -> Tensor:
    pooled: Tensor = model.norm(hidden)[:, getattr(model, "num_prefix_tokens", 0) :].mean(1)
    return pooled


def _pooled(model: Any, hidden: Tensor) -> Tensor:
    pooled: Tensor = model.pool(model.norm(hidden))
    return pooled


def _pre_logits(model: Any, hidden: Tensor) -> Tensor:
    read: Tensor = model.forward_head(model.norm(hidden), pre_logits=True)
    return read


def _nothing(model: Any) -> nn.Module:
    return nn.Identity()


#: best first: the earlier ones leave more of the readout to the head, whose own copy of the norm can be trained
READINGS: dict[str, _Reading] = {
    "token": _Reading(_first, _norms),
    "pooled": _Reading(_pooled, _fc_norm),
    "mean": _Reading(_mean, _fc_norm),
    "pre_logits": _Reading(_pre_logits, _nothing),
}


@torch.no_grad()
def _reading(model: nn.Module, seen: _Seen) -> str:
    """Return the name of the first reading that gives the head exactly what the model gives it; else raises."""
    kind = type(model).__name__
    with evaluating(model):
        if not near(model.head(seen.read), seen.logits):  # type: ignore[operator]
            raise UnsupportedModel(f"{kind} is a timm model, but its output is not what its `head` says")
        for name, reading in READINGS.items():
            try:
                read = reading.norm(model)(reading.pool(model, seen.state))
            except (AttributeError, TypeError):  # no `pool`, or a forward_head without pre_logits
                continue
            if near(read, seen.read):
                return name
    raise UnsupportedModel(
        f"{kind} is a timm model, but its `head` does not read its last block through `norm` and pooling alone "
        f"(something else runs in between)"
    )
