"""Own norm and a low-rank PEFT adapter on the backbone's unembedding (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import offramp
from offramp import checkpoint
from offramp._registry import register
from offramp.attach import MODULE, Exits
from offramp.backbone import Tap
from offramp.errors import BadArgument, DamagedFile, NotAttached
from offramp.head import ExitHead, HeadContext, Rows

#: name of the adapter on the model; not "exits", which is the path of the heads: PEFT looks for names inside of keys
ADAPTER = "early_exit"
TARGETS = r"(.*\.)?exits\.\d+\.proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Unembedding(nn.Linear):
    """The backbone's own projection seen from a head: its weight IS the backbone's, never saved or moved twice."""

    def __init__(self, source: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["source"] = source
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The backbone's Parameter [classes, width], whatever it is at the moment."""
        return self.__dict__["source"].weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The backbone's Parameter [classes], or None."""
        return getattr(self.__dict__["source"], "bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Call the backbone's projection, with its hooks (offload, shards); [..., width] -> [..., classes]."""
        return self.__dict__["source"](input)  # type: ignore[no-any-return]


class TiedLora(LoraLinear):
    """PEFT's LoRA layer over a weight that belongs to the backbone: it can be switched off, but never merged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to change the backbone's unembedding; adapters that are not on this layer are none of its business."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if any(n in self.lora_A for n in names):
            raise BadArgument(
                "merging an exit's LoRA would write into the unembedding that the model itself uses, and change the "
                "model. Leave the adapter unmerged, or give the heads projections of their own: "
                "exits = offramp_hf.heads.lora.untie(exits). To merge other adapters, detach first: exits.detach()"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Do what PEFT's unloading does to one layer; this layer stays when only other adapters are merged."""
        if not merge:
            return self.get_base_layer()  # type: ignore[no-any-return]
        self.merge(safe_merge, adapter_names)
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters of this layer; choosing an adapter for the backbone alone does not switch the head off."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not names or any(n in self.lora_A for n in names):
            super().set_adapter(names, inference_mode)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows [len(ids), width] of the weight with the active adapters merged in."""
        base: Any = self.base_layer
        rows: Tensor = base.weight[ids]
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_A:
                low = self.lora_B[name].weight[ids] @ self.lora_A[name].weight
                rows = rows + (self.scaling[name] * low).to(rows.dtype)
        return rows

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x @ W.T + b + scaling * (x @ A.T) @ B.T; [..., width] -> [..., classes]."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        plain = name in self.lora_A and name not in self.lora_variant and self.lora_B[name].bias is None
        if args or kwargs or self.disable_adapters or not plain or self.lora_A[name].weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        out: Tensor = self.base_layer(x).contiguous()
        low = self.lora_A[name](self.lora_dropout[name](x))
        # one pass over the [rows, classes] logits and no second copy, instead of PEFT's three: 0.8x the time at 64 rows
        rows = out.view(-1, out.shape[-1])
        rows.addmm_(low.reshape(-1, low.shape[-1]), self.lora_B[name].weight.t(), alpha=self.scaling[name])
        return out


@register("lora")
class Lora(ExitHead):
    """Norm of its own, projection of the backbone plus a rank-r PEFT adapter; r * (width + classes) numbers per exit.

    r: rank; alpha: LoRA's scale, the update counts alpha / r (default 2 * r, so 2, whatever the rank); dropout: on the
    adapter's input while training. Untrained (B = 0) it is the logit lens. While attached to a transformers model
    without adapters, base weights are frozen, as PEFT does for any adapter; `detach` puts the flags back. Raises
    `BadArgument`.
    """

    extra = ("proj.",)  # in the PEFT adapter

    def __init__(self, base: HeadContext) -> None:
        super().__init__()
        self.exit_norm = copy.deepcopy(base.norm)
        self.proj = Unembedding(base.projection)
        self.finish = base.finish

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, r: int = 16, alpha: float | None = None, dropout: float = 0.0) -> Lora:
        """Start as the logit lens; refuses a readout that is not one matrix, and options outside their range."""
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise BadArgument(f"lora: r={r!r} is no rank; give a whole number above 0, e.g. r=16")
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise BadArgument(f"lora: alpha={alpha!r} must be a number above 0, or None for 2 * r")
        if not 0 <= dropout < 1:
            raise BadArgument(f"lora: dropout={dropout!r} must be at least 0 and below 1")
        weight, wanted = getattr(base.projection, "weight", None), (base.classes, base.width)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != wanted or not weight.is_floating_point():
            found = f"{tuple(weight.shape)}, {weight.dtype}" if isinstance(weight, Tensor) else "no weight"
            raise BadArgument(
                f"lora needs an unembedding that is one floating matrix [classes, width] = {list(wanted)}; "
                f"this model has {type(base.projection).__name__} ({found}): use head='tied' or head='translator'"
            )
        return cls(base)

    def narrowed(self, ids: Tensor) -> ExitHead:
        """Return the head with some rows of its projection, the adapter merged into them."""
        return self.sharing(proj=Rows(self.proj, ids))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        out: Tensor = self.finish(self.proj(self.exit_norm(hidden)))
        return out

    @classmethod
    def attached(cls, exits: Exits) -> Callable[[], None]:
        """Let PEFT wrap the projections and list the adapter on the model; returns the exact undo."""
        model, heads = exits.model, exits.modules
        listed = getattr(model, "peft_config", None)
        if isinstance(listed, dict) and ADAPTER in listed:
            raise BadArgument(f"the model already has an adapter called {ADAPTER!r}: model.delete_adapter({ADAPTER!r})")
        config = _config(**{"r": 16, "alpha": None, "dropout": 0.0, **exits.config})
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
        holder = nn.Module()  # PEFT wraps below this, so that nothing else on the model is touched
        holder.add_module(MODULE, heads)
        inject_adapter_in_model(config, holder, ADAPTER)
        for head in heads.values():
            head.exit_norm.requires_grad_(True)
        heads.train(model.training)
        return _Listing(model).enter(config)

    @classmethod
    def save_extra(cls, exits: Exits, folder: Path) -> list[str]:
        """Write the PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_state(exits).items()}
        checkpoint.write_bytes(folder / WEIGHTS, save_tensors(tensors, {"format": "pt"}))
        first: Any = exits[exits.at[0]].proj
        config = _config(first.r[ADAPTER], first.lora_alpha[ADAPTER], exits.config.get("dropout", 0.0))
        config.base_model_name_or_path = getattr(exits.model, "name_or_path", None)
        config.inference_mode = True
        with tempfile.TemporaryDirectory() as scratch:  # PEFT writes in place; ours appears whole
            config.save_pretrained(scratch)
            checkpoint.write_bytes(folder / CONFIG, (Path(scratch) / CONFIG).read_bytes())
        return [CONFIG, WEIGHTS]

    @classmethod
    def load_extra(cls, exits: Exits, folder: Path) -> None:
        """Read the adapter's weights into the wrapped projections, after checking every name and shape."""
        tensors, _ = checkpoint.read_safetensors(folder / WEIGHTS)
        wanted = adapter_state(exits)
        odd = sorted(tensors.keys() ^ wanted.keys())
        odd += [k for k in tensors.keys() & wanted.keys() if tensors[k].shape != wanted[k].shape]
        if odd:
            raise DamagedFile(f"{folder / WEIGHTS}: weights do not match the heads ({', '.join(odd[:4])})")
        for name, value in tensors.items():
            wanted[name].data.copy_(value)


def _config(r: int, alpha: float | None, dropout: float) -> LoraConfig:
    config = LoraConfig(r=r, lora_alpha=2 * r if alpha is None else alpha, lora_dropout=dropout, target_modules=TARGETS)
    config._register_custom_module({Unembedding: TiedLora})
    return config


def adapter_state(exits: Exits) -> dict[str, Tensor]:
    """Return the low-rank weights under PEFT's names for them in a file; raises `NotAttached` when unloaded."""
    found = {}
    for depth in exits.at:
        proj: Any = exits[depth].proj
        if ADAPTER not in getattr(proj, "lora_A", {}):
            raise NotAttached(
                f"the exit at depth {depth} has no adapter {ADAPTER!r} any more (it was deleted or unloaded); "
                f"exits.detach() and offramp.attach(model, at={list(exits.at)}, head='lora') again"
            )
        for part in ("lora_A", "lora_B"):
            key = f"base_model.model.{MODULE}.{depth}.proj.{part}.weight"
            found[key] = getattr(proj, part)[ADAPTER].weight
    return found


@dataclass
class _Listing:
    """The adapter's entry in the model's PEFT list; an object and no closure, so that a deep copy undoes its own."""

    model: Any
    config_before: bool = False
    flag_before: bool = False
    frozen: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def enter(self, config: Any) -> _Listing:
        """List the adapter where the model's class knows PEFT (transformers, diffusers); elsewhere do nothing."""
        if not hasattr(self.model, "_hf_peft_config_loaded"):
            return self
        listed = getattr(self.model, "peft_config", None)
        self.config_before = isinstance(listed, dict)
        self.flag_before = "_hf_peft_config_loaded" in self.model.__dict__
        if isinstance(listed, dict):
            listed[ADAPTER] = config
            return self
        # PEFT freezes the base with the first adapter only; a later `add_adapter` of the user's relies on that
        ours = {id(p) for p in getattr(self.model, MODULE).parameters()}
        self.frozen = [(p, p.requires_grad) for p in self.model.parameters() if id(p) not in ours]
        for parameter, _ in self.frozen:
            parameter.requires_grad_(False)
        self.model.peft_config = {ADAPTER: config}
        self.model._hf_peft_config_loaded = True
        return self

    def __call__(self) -> None:
        """Take the entry out; adapters that the user added meanwhile keep the list and the frozen base."""
        state = self.model.__dict__
        listed = getattr(self.model, "peft_config", None)
        if isinstance(listed, dict):
            for name in self._only_on_exits() | {ADAPTER}:
                listed.pop(name, None)
        if self.config_before or listed:
            return
        state.pop("peft_config", None)
        if not self.flag_before:
            state.pop("_hf_peft_config_loaded", None)
        elif hasattr(self.model, "_hf_peft_config_loaded"):
            self.model._hf_peft_config_loaded = False
        for parameter, flag in self.frozen:
            parameter.requires_grad_(flag)
        self.frozen = []

    def _only_on_exits(self) -> set[str]:
        """Return adapters, such as a second one loaded from an exits directory, that leave the model with its heads."""
        on: dict[bool, set[str]] = {True: set(), False: set()}
        for path, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                keys = {k for n in module.adapter_layer_names for k in getattr(module, n, {})}
                on[path.startswith(f"{MODULE}.")] |= keys
        return on[True] - on[False]


def untie(exits: Exits) -> Exits:
    """Replace LoRA exits by `linear` exits with projections of their own, the adapter merged into them.

    Costs classes * width numbers per exit. Detaches `exits` and returns the new ones; raises `BadArgument` when the
    unembedding is not a plain linear layer, and leaves the model as it was then.
    """
    norms = {d: copy.deepcopy(exits[d].exit_norm.state_dict()) for d in exits.at}  # type: ignore[union-attr]
    if any(type(exits[d].proj.base_layer.source) is not nn.Linear for d in exits.at):  # type: ignore[union-attr]
        raise BadArgument("untie needs a plain nn.Linear unembedding; detach adapters from it first")
    deltas = {d: exits[d].proj.get_delta_weight(ADAPTER) for d in exits.at}  # type: ignore[union-attr, operator]
    model, gate = exits.model, exits.gate and exits.gate_module
    named = None if exits.gate is None else {"gate": exits.gate, **exits.gate_config}
    exits.detach()
    own = offramp.attach(model, at=list(exits.at), head="linear", gate=named)
    if gate:
        own.gate_module.load_state_dict(gate.state_dict())
    for depth in own:
        head: Any = own[depth]
        head.exit_norm.load_state_dict(norms[depth])
        head.proj.weight.data += deltas[depth].to(head.proj.weight)
    return own
