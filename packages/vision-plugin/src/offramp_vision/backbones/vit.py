"""timm vision transformers, and whatever of timm is built like them: one chain of blocks, then norm, pooling, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import BlockSpec, Call, Chain, learn_spec
from offramp.enable import Run, paused
from offramp.engine import SinglePass
from offramp.errors import BadArgument, UnsupportedModel
from offramp.head import HeadContext
from offramp.record import evaluating

IMAGES, LABELS = ("pixel_values", "x"), ("labels", "y")


class VitBackbone(Backbone):
    """A timm model with `blocks` on a [batch, token, width] state and one `head` that reads what is pooled from it."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        _structure(model)
        self.names = [f"blocks.{name}" for name, _ in model.blocks.named_children()]  # type: ignore[union-attr]
        seen = _probe(model)
        self.spec, self.width, self.classes = seen.spec, seen.state.shape[-1], seen.logits.shape[-1]
        self.reading = _reading(model, seen)

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block."""
        return [Tap(name, i + 1, self.width, "batch token width") for i, name in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return the norms that follow the pooling, and the model's own classifier."""
        norm = READINGS[self.reading].norm(self.model)
        return HeadContext(norm, self.model.head, _same, self.width, self.classes)  # type: ignore[arg-type]

    def chain(self) -> Chain:
        """Return the blocks; a shared relative position is not cut with the batch."""
        return Chain(list(self.model.blocks), self.spec)  # type: ignore[arg-type]

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what the head reads, the class token or pooled tokens: [batch, token, width] -> [batch, width]."""
        return READINGS[self.reading].pool(self.model, hidden)

    def call(self, batch: Any) -> Any:
        """Run the model on a tensor of images, or on those of (images, labels) or of a mapping."""
        return self.model(_split(batch)[0])

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return the pooled states of each image at `depths` and at the end, and the labels if the batch has some."""
        images, labels = _split(batch)
        with paused(self.model), self.chain().capture([*depths, self.depth]) as kept:
            self.model(images)
        final = self.pool(kept[self.depth])
        targets = None if labels is None else labels.to(final.device)
        return Observed([self.pool(kept[d]) for d in depths], final, targets, sample=torch.arange(len(images)))

    def drive(self, run: Run) -> Undo:
        """Let images leave inside one forward; raises `BadArgument` for options of generation."""
        for name, plain in (("verify", False), ("draft", None), ("kv", "catch_up"), ("rollback", None)):
            if (given := getattr(run.options, name)) != plain:
                raise BadArgument(
                    f"{name}={given!r} is for models that generate tokens; {type(self.model).__name__} answers once "
                    f"per image, so there is nothing to draft and no cache: leave {name} out"
                )
        return SinglePass(run, self.model.head).install()  # type: ignore[arg-type]

    def flag(self) -> Mapping[str, Any] | None:
        """Return the dict under `early_exit` in the model's `pretrained_cfg`, or None."""
        config = getattr(self.model, "pretrained_cfg", None)
        found = config.get("early_exit") if isinstance(config, Mapping) else None
        return found if isinstance(found, Mapping) else None


def _same(logits: Tensor) -> Tensor:
    return logits


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return images and labels (or None) of a batch; raises `BadArgument` naming what can be given."""
    if isinstance(batch, Mapping):
        images = next((batch[k] for k in IMAGES if k in batch), None)
        labels = next((batch[k] for k in LABELS if k in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        images, labels = batch
    else:
        images, labels = batch, None
    if not isinstance(images, Tensor) or images.dim() != 4 or not (labels is None or isinstance(labels, Tensor)):
        raise BadArgument(
            "a batch of images is a tensor [batch, channel, height, width], a pair (images, labels), or a mapping "
            f"with {' or '.join(map(repr, IMAGES))} and, for labels, {' or '.join(map(repr, LABELS))}; "
            f"got {_describe(batch)}"
        )
    return images, labels


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch)) or 'nothing'}"
    return f"a {type(batch).__name__}"


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


def _probe(model: nn.Module) -> _Seen:
    """Run the model on 2 and 3 small batches of noise, first block only; raises `UnsupportedModel` with the reason."""
    blocks, reads = list(model.blocks), []  # type: ignore[arg-type]
    outputs: list[Any] = []
    watch = model.head.register_forward_pre_hook(lambda _, args: reads.append(args[0]))  # type: ignore[union-attr]
    try:
        with evaluating(model), torch.no_grad():
            spec, calls = learn_spec(blocks, lambda batch: outputs.append(model(_noise(model, batch))), "x", first=True)
            _check(calls, outputs[0], reads, blocks)
            state = calls[1].hidden  # the first block has run, the others returned what they were given
            return _Seen(spec, state, reads[0], outputs[0])
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


def _noise(model: nn.Module, batch: int) -> Tensor:
    """Return images of the size that the model takes, the same each time; the global random state is not touched."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    for module in model.modules():
        if (given := getattr(module, "img_size", None)) is not None:
            size = [given, given] if isinstance(given, int) else list(given)
            break
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    like = next(p for p in model.parameters() if p.is_floating_point())
    shape = (batch, channels if first is None else first.in_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


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
        if not _near(model.head(seen.read), seen.logits):  # type: ignore[operator]
            raise UnsupportedModel(f"{kind} is a timm model, but its output is not what its `head` says")
        for name, reading in READINGS.items():
            try:
                read = reading.norm(model)(reading.pool(model, seen.state))
            except (AttributeError, TypeError):  # no `pool`, or a forward_head without pre_logits
                continue
            if _near(read, seen.read):
                return name
    raise UnsupportedModel(
        f"{kind} is a timm model, but its `head` does not read its last block through `norm` and pooling alone "
        f"(something else runs in between)"
    )


def _near(found: Any, wanted: Tensor) -> bool:
    loose = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 3e-2
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool(((found - wanted).abs().amax() <= loose * (wanted.abs().amax() + loose)).item())
