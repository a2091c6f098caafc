"""How an encoder's classifier is built, found by running it: its chain of blocks and the way on to its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from offramp.blocks import state_of
from offramp.errors import UnsupportedModel

Probe = Callable[[], Any]

#: activation functions that classifiers put between their layers, the usual ones first: two that agree on the values of
#: a probe are told apart by their order, and the proof on large random states catches a wrong one
ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "sigmoid")


@dataclass
class Leaf:
    """One call of a module without children: what went in and what came out."""

    name: str
    module: nn.Module
    taken: Tensor
    given: Tensor


def find_blocks(model: nn.Module, probe: Probe) -> tuple[list[str], list[nn.Module]]:
    """Return names and modules of the blocks in the order in which they run, a shared one once per run.

    A chain of blocks is a module list whose members, when `probe()` runs the model, each take the hidden state that the
    one before returned. Raises `UnsupportedModel` when there is none, or more than one that is not part of another.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    runs: dict[str, list[tuple[str, nn.Module, Any, Any]]] = {name: [] for name in lists}
    handles = []
    for owner, members in lists.items():
        for i, member in enumerate(members):

            def note(
                module: nn.Module, args: Any, kwargs: Any, output: Any, owner: str = owner, name: str = f"{owner}.{i}"
            ) -> None:
                taken = args[0] if args else kwargs.get("hidden_states")
                runs[owner].append((name, module, taken, state_of(output)))

            handles.append(member.register_forward_hook(note, with_kwargs=True))
    try:
        probe()
    finally:
        for handle in handles:
            handle.remove()
    breaks = {name: _break(run) for name, run in runs.items() if len(run) > 1}
    whole = [name for name, reason in breaks.items() if reason is None]
    outer = [name for name in whole if not any(name.startswith(other + ".") for other in whole)]
    if len(outer) == 1:
        return [name for name, *_ in runs[outer[0]]], [module for _, module, *_ in runs[outer[0]]]
    what = type(model).__name__
    if outer:
        raise UnsupportedModel(f"{what} has several chains of blocks ({', '.join(outer)}); one is expected")
    why = "; ".join(f"{name}: {reason}" for name, reason in breaks.items()) or "no module list runs two blocks or more"
    raise UnsupportedModel(f"{what} has no chain of blocks where each takes the state that the one before gave ({why})")


def _break(run: Sequence[tuple[str, nn.Module, Any, Any]]) -> str | None:
    """Return where the calls of a module list are no chain, or None."""
    for name, _, taken, given in run:
        tensors = isinstance(taken, Tensor) and isinstance(given, Tensor)
        if not tensors or taken.shape != given.shape or taken.dim() != 3:
            return f"{name} does not map a [batch, token, width] state to one of the same shape"
    for (before, _, _, given), (name, _, taken, _) in zip(run[:-1], run[1:], strict=True):
        if given is not taken and not torch.equal(given, taken):
            return f"something else changes the state between {before} and {name}"
    return None


class Pool:
    """Which part of a hidden state the classifier reads: `kind` "first" token or "mean" over the tokens of the mask."""

    def __init__(self, kind: str, before: nn.Module | None = None) -> None:
        self.kind, self.before = kind, before

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map [batch, token, width] to [batch, width]; mask: [batch, token], 1 = real, None = all are (mean only)."""
        if self.kind == "first":
            return hidden[:, 0]
        if self.before is not None:
            hidden = self.before(hidden)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device, dtype=torch.bool)
        # as a product: 43 us instead of 303 us for 64 x 12 states of width 384, and every exit asks for it
        total: Tensor = torch.bmm(mask.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
        return total / mask.sum(dim=1, keepdim=True)


@dataclass
class Readout:
    """The way from the last block's state to the logits: pool, then modules, then the projection."""

    pool: Pool
    norm: nn.Sequential
    projection: nn.Module


def find_readout(model: nn.Module, last: nn.Module, mask: Tensor, probe: Probe) -> Readout:
    """Follow the values back from the logits to the last block's state.

    probe() must run the model and return its logits [batch, classes] for inputs with that attention mask. Raises
    `UnsupportedModel` naming the place where the values cannot be explained.
    """
    state, leaves, logits = _tail(model, last, probe)
    what = type(model).__name__
    end = next((i for i in range(len(leaves) - 1, -1, -1) if _same(leaves[i].given, logits)), None)
    if end is None:
        wide = [leaf.name for leaf in leaves if leaf.given.dim() == 3 and leaf.given.shape[-1] == logits.shape[-1]]
        why = f"{wide[-1]} classifies every token and one is picked afterwards" if wide else "none returns them"
        raise UnsupportedModel(f"the logits of {what} are not what one of its modules returns: {why}")
    steps: list[nn.Module | str] = []
    at: int | None = end
    while at is not None:
        leaf = leaves[at]
        steps.insert(0, leaf.module)
        found = _source(leaf.taken, leaves[:at], state, mask)
        if found is None:
            raise UnsupportedModel(f"what {what} does to its last hidden state before {leaf.name} is not understood")
        at, glue = found
        if glue is not None:
            steps.insert(0, glue)
    pools = [i for i, step in enumerate(steps) if isinstance(step, str)]
    if len(pools) != 1:
        raise UnsupportedModel(f"{what} gives one prediction per row, but not from one state per row ({steps})")
    before = [m for m in steps[: pools[0]] if isinstance(m, nn.Module)]
    after = [m for m in steps[pools[0] + 1 : -1] if isinstance(m, nn.Module)]
    if steps[pools[0]] == "first":  # what acts on each token can as well act on the first only
        return Readout(Pool("first"), nn.Sequential(*before, *after), leaves[end].module)
    return Readout(Pool("mean", nn.Sequential(*before) if before else None), nn.Sequential(*after), leaves[end].module)


def _tail(model: nn.Module, last: nn.Module, probe: Probe) -> tuple[Tensor, list[Leaf], Tensor]:
    """Run the model; return the last block's state, the leaf calls after it, and the logits."""
    states: list[Tensor] = []
    leaves: list[Leaf] = []

    def block(module: nn.Module, args: Any, output: Any) -> None:
        leaves.clear()
        states[:] = [state_of(output)]

    def leaf(module: nn.Module, args: Any, output: Any) -> None:
        if states and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            leaves.append(Leaf(names[module], module, args[0], output))

    inside = set(last.modules())
    names = {m: n for n, m in model.named_modules() if m not in inside and not list(m.children())}
    idle = (nn.Dropout, nn.Identity)  # hand on their input in eval mode
    handles = [m.register_forward_hook(leaf) for m in names if not isinstance(m, idle)]
    handles.append(last.register_forward_hook(block))
    try:
        logits = probe()
    finally:
        for handle in handles:
            handle.remove()
    return states[0], leaves, logits


def _source(target: Tensor, leaves: list[Leaf], state: Tensor, mask: Tensor) -> tuple[int | None, Any] | None:
    """Return (leaf call or None for the state, what lies between) that explains `target`; None when nothing does."""
    candidates: list[tuple[int | None, Tensor]] = [(i, leaf.given) for i, leaf in reversed(list(enumerate(leaves)))]
    candidates.append((None, state))
    for way in (_plain, _pooled, _activated):
        for index, value in candidates:
            for glue, result in way(value, target, mask):
                if _same(result, target):
                    return index, glue
    return None


def _plain(value: Tensor, target: Tensor, mask: Tensor) -> Iterator[tuple[Any, Tensor]]:
    yield None, value


def _pooled(value: Tensor, target: Tensor, mask: Tensor) -> Iterator[tuple[Any, Tensor]]:
    if value.dim() == 3 and target.dim() == 2:
        yield "first", value[:, 0]
        if value.shape[:2] == mask.shape:
            # as models write it: what a module gets is told by equality to the bit, and Pool rounds differently
            yield "mean", (value * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _activated(value: Tensor, target: Tensor, mask: Tensor) -> Iterator[tuple[Any, Tensor]]:
    if value.shape == target.shape:
        for name in ACTIVATIONS:
            yield ACT2FN[name], ACT2FN[name](value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
