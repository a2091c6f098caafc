"""The trace: what every exit would have said on a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadArgument, DamagedFile
from offramp.policy import Evidence

FORMAT = 1
#: a target that means "no label", as in torch.nn.functional.cross_entropy
UNLABELLED = -100
_OPTIONAL = ("targets", "position", "losses", "logits")


@dataclass(frozen=True, eq=False)
class Trace:
    """What every exit said about N rows; column k is the exit at `depths[k]`, the last column the full model.

    depths: K ascending depths in blocks, the attached exits and the full depth; costs: [K] cumulative cost of leaving
    at each, in `unit`, ascending; stats: [N, K] floats by name (top1, margin, entropy in nats, cosine with the
    previous column, undefined in the first; of trained gates of heads their probability `gate`, 0 where the answer is
    no candidate, undefined in the last; of the gate beside the exits its probability, 1 in the last);
    label: [N, K] argmax; classes: of the prediction; targets: [N] true labels, -100 for none; position: [N]; losses:
    [N, K] task loss; logits: [N, K, classes]; model_hash: of model and heads. Tensors are kept on the CPU. Raises
    `BadArgument` when shapes disagree.
    """

    depths: tuple[int, ...]
    stats: Mapping[str, Tensor]
    label: Tensor
    classes: int
    costs: Tensor | None = None
    targets: Tensor | None = None
    position: Tensor | None = None
    losses: Tensor | None = None
    logits: Tensor | None = None
    model_hash: str = ""
    unit: str = "blocks"

    def __post_init__(self) -> None:
        depths = tuple(int(d) for d in self.depths)
        if len(depths) < 2 or list(depths) != sorted(set(depths)) or depths[0] < 1:
            raise BadArgument(f"depths must be ascending and hold an exit and the full depth, not {list(depths)}")
        costs = torch.tensor(depths) if self.costs is None else torch.as_tensor(self.costs)
        keep = object.__setattr__
        keep(self, "depths", depths)
        keep(self, "costs", costs.detach().cpu().double())
        keep(self, "label", self.label.detach().cpu())
        keep(self, "stats", {k: v.detach().cpu() for k, v in sorted(self.stats.items())})
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                keep(self, name, getattr(self, name).detach().cpu())
        self._check()

    def _check(self) -> None:
        n, k = (len(self.label) if self.label.dim() else 0), len(self.depths)
        wanted: dict[str, tuple[int, ...]] = {"label": (n, k), "costs": (k,), "targets": (n,), "position": (n,)}
        wanted |= {"losses": (n, k), "logits": (n, k, self.classes), **{f"stats.{s}": (n, k) for s in self.stats}}
        for name, tensor in self._arrays().items():
            if tuple(tensor.shape) != wanted[name]:
                raise BadArgument(
                    f"{name} has shape {list(tensor.shape)}, expected {list(wanted[name])} (rows, depths)"
                )
        costs: Any = self.costs
        if not bool(costs.isfinite().all() and costs[0] > 0 and (costs.diff() > 0).all()):
            raise BadArgument(
                f"costs must be above 0 and grow with depth, as leaving later runs more; got {costs.tolist()} for "
                f"depths {list(self.depths)}: give the cost of everything that ran up to each exit"
            )
        self._in_range("label", self.label)
        if self.targets is not None:
            self._in_range("targets", self.targets[self.targets != UNLABELLED])

    def _in_range(self, name: str, values: Tensor) -> None:
        """Raise unless every value is one of the classes."""
        if not values.numel():
            return
        low, high = values.min().item(), values.max().item()
        if low < 0 or high >= self.classes:
            raise BadArgument(
                f"{name} must be whole numbers from 0 to {self.classes - 1} (classes={self.classes}), or {UNLABELLED} "
                f"for a target that is not known; got values from {low} to {high}"
            )

    def _arrays(self) -> dict[str, Tensor]:
        """Return every tensor by name, those of `stats` with a prefix."""
        found = {"label": self.label, "costs": self.costs, **{n: getattr(self, n) for n in _OPTIONAL}}
        found |= {f"stats.{k}": v for k, v in self.stats.items()}
        return {k: v for k, v in found.items() if v is not None}

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Any) -> Trace:
        """Return the trace of some rows: a slice, a list or tensor of indices, a bool mask, or one index."""
        pick = [int(rows)] if isinstance(rows, Integral) else rows
        if not isinstance(pick, slice):
            pick = torch.as_tensor(pick, dtype=None if len(pick) else torch.long)
        cut: dict[str, Any] = {n: getattr(self, n) for n in ("label", *_OPTIONAL)}
        cut = {n: None if tensor is None else tensor[pick] for n, tensor in cut.items()}
        stats = {k: v[pick] for k, v in self.stats.items()}
        kept = {n: getattr(self, n) for n in ("classes", "costs", "model_hash", "unit")}
        return Trace(self.depths, stats, **kept, **cut)

    def __repr__(self) -> str:
        have = ", ".join([*self.stats, *(n for n in _OPTIONAL if getattr(self, n) is not None)])
        return f"Trace({len(self)} rows, depths={list(self.depths)}, {self.classes} classes: {have})"

    def finite(self, needs: Iterable[str] = ()) -> Tensor:
        """Return the mask [N] of rows whose statistics are finite, those of the predictions and those in `needs`.

        Left out is what is undefined for every row: cosines of the first column, gates of heads of the last.
        """
        found = torch.ones(len(self), dtype=torch.bool)
        for name in ({"top1", "margin", "entropy"} | set(needs)) & set(self.stats):
            table = self.stats[name]
            table = table[:, 1:] if name == "cosine" else table[:, :-1] if name == "gate" else table
            found &= table.isfinite().all(1)
        return found

    @property
    def labelled(self) -> Tensor | None:
        """Return the mask [N] of rows with a label, None where no row has one."""
        known = None if self.targets is None else self.targets != UNLABELLED
        return known if known is not None and bool(known.any()) else None

    @property
    def data_hash(self) -> str:
        """Return the sha256 of every array with its name, type and shape, of the depths and of the class count."""
        digest = hashlib.sha256(repr((self.depths, self.classes)).encode())
        for name, tensor in sorted(self._arrays().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def evidence(self, column: int, rows: Tensor | None, needs: Collection[str] | None = None) -> Evidence:
        """Return what a policy would see at exit `column` for these rows [n] of indices, None for all of them.

        needs: statistics wanted, None for all that the trace holds; "label" and "top1" come with any.
        """
        last, every = column == len(self.depths) - 2, rows is None

        def cut(table: Tensor, at: int = column) -> Tensor:
            return table[:, at] if every else table[rows, at]

        wanted = self.stats if needs is None else {"top1", *needs}
        stats = {k: cut(v) for k, v in self.stats.items() if k in wanted} | {"label": cut(self.label)}
        table = self.logits if needs is None or "prediction" in needs else None
        logits = None if table is None else cut(table)
        before = None if table is None or not column else cut(table, column - 1)
        position = self.position if self.position is None or every else self.position[rows]
        depth = self.depths[column]
        return Evidence(column, depth, column == 0, last, None, logits, self.classes, position, stats, before=before)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save

        from offramp.checkpoint import write_bytes

        body: dict[str, Any] = {"format": FORMAT, "depths": self.depths}
        body |= {name: getattr(self, name) for name in ("classes", "model_hash", "unit")}
        tensors = {k: v.contiguous().clone() for k, v in self._arrays().items()}  # safetensors refuses shared memory
        write_bytes(Path(path), save(tensors, {"trace": json.dumps({**body, "data_hash": self.data_hash})}))

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote; raises `DamagedFile` when it is not that, whole and unchanged."""
        from offramp.checkpoint import read_safetensors

        tensors, metadata = read_safetensors(Path(path))
        try:
            body = json.loads(metadata["trace"])
            newer = body["format"] > FORMAT
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{path} is a safetensors file, but not a trace; write one with trace.save(path)"
            ) from error
        if newer:
            raise DamagedFile(
                f"{path} has trace format {body['format']}, this offramp reads up to {FORMAT}: "
                "pip install -U offramp-core"
            )
        stats = {k.removeprefix("stats."): tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
        try:
            known = {f.name for f in fields(cls)}
            trace = cls(
                tuple(body["depths"]),
                stats,
                classes=body["classes"],
                model_hash=body["model_hash"],
                unit=body.get("unit", "blocks"),  # files written before costs had a unit hold blocks
                **{k: v for k, v in tensors.items() if k in known},
            )
            same = trace.data_hash == body["data_hash"]
        except (BadArgument, KeyError, TypeError) as error:
            raise DamagedFile(f"{path}: the trace is not complete ({error})") from error
        if not same:
            raise DamagedFile(f"{path}: its contents are not those it was saved with (data_hash differs)")
        return trace
