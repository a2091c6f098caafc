"""Diffusion transformers with one stream: `transformer_blocks` on a [batch, token, width] state, then `norm_out`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._registry import lookup, names
from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import BlockSpec, Call, Chain, learn_spec
from offramp.enable import Run, paused
from offramp.engine import LOGITS, SinglePass
from offramp.errors import BadArgument, UnsupportedModel
from offramp.gating import gate_of
from offramp.head import HeadContext
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp.record import evaluating
from offramp_diffusers.heads.passthrough import Passthrough

#: statistics of a prediction, and what is trained on them
NOT_HERE = LOGITS | {"gate"}
#: tokens of text that the probe brings along, and where a config says how wide they are
TEXT, TEXT_WIDTH = 3, ("caption_channels", "joint_attention_dim", "cross_attention_dim")


class DitBackbone(Backbone):
    """A diffusers transformer whose blocks run one after the other on one state, read by output layers of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        _structure(model)
        self.names = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]  # type: ignore[arg-type]
        self.spec, self.width = _probe(model)

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block."""
        return [Tap(name, i + 1, self.width, "batch token width") for i, name in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return a readout that hands on the state: the output layers need the timestep, so they are not copied."""
        return HeadContext(_Conditioned(type(self.model).__name__), nn.Identity(), _same, self.width, self.width)

    def chain(self) -> Chain:
        """Return the blocks; timestep, labels and text are cut with the batch."""
        return Chain(list(self.model.transformer_blocks), self.spec)  # type: ignore[arg-type]

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

    def drive(self, run: Run) -> Undo:
        """Let the state skip the remaining blocks; raises `BadArgument` for what a denoiser cannot do."""
        kind = type(self.model).__name__
        for name, plain in (("verify", False), ("draft", None), ("kv", "catch_up"), ("rollback", None)):
            if (given := getattr(run.options, name)) != plain:
                raise BadArgument(f"{name}={given!r} is for models that generate tokens; {kind} does not: leave it out")
        if run.exits.head != Passthrough.name:  # type: ignore[attr-defined]
            raise BadArgument(
                f"heads {run.exits.head!r} would not be used: at an exit of {kind} the model's own output layers read "
                f'the state; attach with head="passthrough"'
            )
        if looks := _missing(run.policy):
            raise BadArgument(
                f"{type(run.policy).__name__} looks at {', '.join(looks)} of a prediction, and an exit of {kind} has "
                f"none: it hands the state to the model's own output layers. Policies that work here: "
                f"{', '.join(_fitting(run))}"
            )
        return SinglePass(run, None).install()

    def flag(self) -> Mapping[str, Any] | None:
        """Return the dict under `early_exit` in the component's config, or None."""
        config = getattr(self.model, "config", None)
        found = config.get("early_exit") if isinstance(config, Mapping) else None
        return found if isinstance(found, Mapping) else None


class _Conditioned(nn.Identity):
    """Stands where other models have a norm of the state alone; a head that wants a copy of it is told why not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise BadArgument(
            f"this head starts from the model's own norm and projection, and those of {self.kind} also take the "
            f"timestep: there is no prediction from the state alone. At an exit the state goes on to the model's own "
            f'output layers: offramp.attach(model, at=[...], head="passthrough")'
        )


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
        if not _missing(example) and not isinstance(example, SchedulePolicy):
            found.append(name)
    return found


def _missing(policy: ExitPolicy) -> list[str]:
    """Return what a policy looks at that exits here do not have."""
    return sorted(s for s in policy.statistics() if s in NOT_HERE or gate_of(s))


def _structure(model: nn.Module) -> None:
    """Raise `UnsupportedModel` with the reason when the parts that this backbone needs are not there."""
    children, kind = dict(model.named_children()), type(model).__name__
    blocks = children.get("transformer_blocks")
    others = [k for k, v in children.items() if k.endswith("transformer_blocks") and k != "transformer_blocks"]
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModel(
            f"{kind} is a diffusers model, but it has no chain of blocks called `transformer_blocks` (its parts: "
            f"{', '.join(children) or 'none'}); this release exits early in diffusion transformers with one stream"
        )
    if len(blocks) < 2:
        raise UnsupportedModel(f"{kind} has {len(blocks)} block, so there is no place for an exit")
    if others or not isinstance(children.get("norm_out"), nn.Module):
        why = f"has a second chain ({', '.join(others)})" if others else "has no `norm_out` after its blocks"
        raise UnsupportedModel(f"{kind} is a diffusers model, but it {why}; this release knows one stream only")


def _probe(model: nn.Module) -> tuple[BlockSpec, int]:
    """Run the model on 2 and 3 tiny latents, first block only; raises `UnsupportedModel` with the reason."""
    kind, read = type(model).__name__, []
    watch = model.norm_out.register_forward_pre_hook(lambda _, args: read.append(args[0]))  # type: ignore[union-attr]
    try:
        with evaluating(model), torch.no_grad():
            blocks = list(model.transformer_blocks)  # type: ignore[arg-type]
            spec, calls = learn_spec(blocks, lambda batch: model(**_noise(model, batch)), first=True)
            _check(spec, calls, read[0], blocks)
            return spec, calls[0].hidden.shape[-1]
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{kind} is a diffusers model, but {error}") from None
    except Exception as error:  # whatever a model may raise: it is not called as image denoisers are
        raise UnsupportedModel(
            f"{kind} is a diffusers model, but calling it as an image denoiser failed ({type(error).__name__}: {error})"
        ) from error
    finally:
        watch.remove()


def _check(spec: BlockSpec, calls: list[Call], read: Tensor, blocks: list[nn.Module]) -> None:
    if spec.size is not None or len({type(block) for block in blocks}) > 1:
        raise UnsupportedModel("its blocks differ, or return more than one state")
    if calls[0].hidden.dim() != 3:
        raise UnsupportedModel(f"its state has shape {tuple(calls[0].hidden.shape)}, not [batch, token, width]")
    states = [call.hidden for call in calls[1:]] + [read]  # all but the first block returned what they were given
    if any(s.shape != states[0].shape or not torch.equal(s, states[0]) for s in states):
        raise UnsupportedModel("something changes the state between its blocks, or between the last one and `norm_out`")


def _noise(model: Any, batch: int) -> dict[str, Any]:
    """Return arguments for a call: 2 x 2 patches of noise, and the conditions that its signature and config ask for."""
    config, takes = model.config, inspect.signature(type(model).forward).parameters
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    side = 2 * (config.get("patch_size") or 1)
    given: dict[str, Any] = {
        "hidden_states": noise(batch, config["in_channels"], side, side),
        "timestep": torch.ones(batch, dtype=torch.long, device=like.device),
        "class_labels": torch.zeros(batch, dtype=torch.long, device=like.device),
        "return_dict": False,
    }
    if text := next((config[k] for k in TEXT_WIDTH if config.get(k)), 0):
        given["encoder_hidden_states"] = noise(batch, TEXT, text)
        given["encoder_attention_mask"] = noise(batch, TEXT) * 0 + 1
    if pooled := config.get("pooled_projection_dim"):
        given["pooled_projections"] = noise(batch, pooled)
    sizes = model.__dict__.get("use_additional_conditions", False)
    given["added_cond_kwargs"] = {
        "resolution": noise(batch, 2) if sizes else None,
        "aspect_ratio": noise(batch, 1) if sizes else None,
    }
    return {k: v for k, v in given.items() if k in takes}
