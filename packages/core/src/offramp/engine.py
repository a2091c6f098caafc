"""The single-pass executor: at each exit head and policy run inside the hook, and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import Call, state_of, with_state
from offramp.enable import Run, check_outputs
from offramp.kernels.compact import compact
from offramp.kernels.confidence import PREDICTION, confidence, cosine
from offramp.policy import Evidence, ExitPolicy, State

Undo = Callable[[], None]
#: what a policy can ask for that takes the head's logits
LOGITS = PREDICTION | {"prediction"}


def look(
    run: Run,
    index: int,
    hidden: Tensor,
    previous: Tensor | None,
    position: Tensor | None = None,
    given: tuple[Tensor | None, dict[str, Tensor], int] | None = None,
    needs: frozenset[str] | None = None,
    recent: Sequence[Sequence[int]] | None = None,
) -> Evidence:
    """Return the evidence of exit `index` for pooled states [rows, width]; its head runs only if it is needed.

    given: the head's prediction, its statistics and how many classes it has, where they are known; the prediction may
    be None where all its statistics are; needs: statistics to compute, None for those of the policy.
    """
    depths = run.exits.at
    needs = run.policy.statistics() if needs is None else needs
    depth = depths[index]
    gate = run.gate if run.gate is not None and run.gate.statistic in needs else None
    asked = gate.needs if gate is not None else frozenset()
    # a gate's candidates come from the first exit's head: run here, it also gives the answer of rows that stop there
    prediction, stats, classes = given or (None, {}, 0)
    if given is None and (needs & LOGITS or asked or ("gate" in needs and index == 0)):
        prediction = run.exits[depth](hidden)
    if prediction is not None:
        stats |= confidence(prediction, (needs | asked) - stats.keys())
        classes = prediction.shape[-1]
    if "cosine" in needs and previous is not None:
        stats["cosine"] = cosine(hidden, previous)
    if gate is not None:
        stats[gate.statistic] = gate(hidden, index, previous, stats)
    last = index == len(depths) - 1
    head = run.exits[depth] if "gate" in needs else None
    return Evidence(index, depth, index == 0, last, hidden, prediction, classes, position, stats, head, recent)


def decide(policy: ExitPolicy, state: State, seen: Evidence) -> tuple[Tensor, State, Tensor]:
    """Return (rows that stop, new state, rows whose evidence is finite); rows with non-finite evidence never stop."""
    stop, state = policy.step(state, seen)
    if "top1" in seen.stats:
        top1 = seen.stats["top1"]
        finite = top1 == top1  # a probability is finite or NaN; `isfinite` is four operations
    elif seen.prediction is not None:
        finite = seen.prediction.isfinite().all(-1)
    elif seen.hidden is not None:
        finite = seen.hidden.isfinite().flatten(1).all(-1)
    else:
        finite = torch.ones_like(stop)
    return stop & finite, state, finite


def chosen(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `index`, which is in order; all of them without a copy."""
    return rows if len(index) == len(rows) else rows[index]


class SinglePass:
    """Drives one forward of the user's own model; bound methods are hooked in, so a deep copy of the model works too.

    Only calls of the model itself exit early: a part of it (a block, `forward_features`) that is called on its own runs
    in full, because there nobody would put the exits' answers into the output, nor count the rows.
    """

    def __init__(self, run: Run, output: nn.Module | None) -> None:
        self.run, self.output = run, output
        self.chain = run.backbone.chain()
        self.index = {depth: i for i, depth in enumerate(run.exits.at)}
        self.forget()

    def forget(self) -> None:
        """Drop everything that belongs to one forward."""
        #: inside a call of the model; past its last block
        self.active = self.through = False
        self.batch = self.ran = 0
        self.rows: Tensor | None = None
        #: those that left, exit by exit: their rows, states and answers, and from which depth
        self.left: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.exited: list[int] = []
        self.state: State = {}
        self.previous: Tensor | None = None

    def install(self) -> Undo:
        """Hook blocks, the model's forward and its output module; returns the exact undo."""
        model = self.run.model
        if self.output is not None:
            check_outputs(self.run.policy, self.run.backbone.context().classes)
        self.removes: list[Undo] = [self.chain.install(self.block)]
        handles = [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, always_call=True),
        ]
        if self.output is not None:
            handles.append(self.output.register_forward_hook(self.answer))
        self.removes += [handle.remove for handle in handles]
        return self.uninstall

    def uninstall(self) -> None:
        """Remove every hook, last one first."""
        while self.removes:
            self.removes.pop()()

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forget an earlier forward, also one that raised."""
        self.chain.reset()
        self.forget()
        self.active = not self.run.paused

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count the rows of a forward that went through; one that raised has no output."""
        if output is not None and self.active:
            stats = self.run.stats
            stats.blocks_run += self.ran
            stats.last_depths = self.depths()
            stats.count(stats.last_depths)
            stats.blocks_full += self.batch * self.run.backbone.depth
        self.forget()

    def depths(self) -> Tensor:
        """Return the depth at which each row of the batch was decided [rows]."""
        device = None if self.rows is None else self.rows.device
        found = torch.full((self.batch,), self.run.backbone.depth, device=device)
        for depth, (rows, *_) in zip(self.exited, self.left, strict=True):
            found[rows] = depth
        return found.cpu()

    def block(self, index: int, call: Call) -> Any:
        """Run one block on the rows that are left; at an exit, let finished rows go; after the last, put all back."""
        if index == 0 and self.batch:
            self.forget()  # of a forward that Ctrl-C ended: torch runs no hook then
        if not self.active or call.hidden.shape[0] == 0:
            return call.run()
        if index == 0:
            self.start(call.hidden)
        self.through = index + 1 == self.run.backbone.depth
        rows = self.rows
        if rows is not None and rows.numel() == 0:
            return call.skip()
        compacted = rows is not None
        output = call.run(rows=rows)
        self.ran += self.batch if rows is None else rows.numel()
        hidden = state_of(output)
        if index + 1 in self.index:
            kept = self.exit(self.index[index + 1], hidden)
            if kept is not None:
                return with_state(output, hidden[kept] if kept.numel() else self.restore(hidden[:0]))
        if self.through and compacted:
            return with_state(output, self.restore(hidden))
        return output

    def start(self, hidden: Tensor) -> None:
        """Begin a batch: every row is in."""
        self.batch = hidden.shape[0]
        self.state = self.run.policy.start(self.batch, hidden.device)

    def exit(self, index: int, hidden: Tensor) -> Tensor | None:
        """Ask the policy at one exit. Returns the indices of the rows that go on, or None when all do."""
        run = self.run
        pooled = self.pool(hidden)
        seen = look(run, index, pooled, self.previous)
        stop, self.state, finite = decide(run.policy, self.state, seen)
        self.previous = pooled if run.looks_back else None
        stops, sound = torch.stack([stop, finite]).tolist()  # the host sync of an exit; counted here: 4 operations less
        run.stats.nonfinite += sound.count(False)
        if not (count := stops.count(True)):
            return None
        gone, answer = compact(stop, count=count)[0], None
        if self.output is not None and seen.prediction is not None:
            answer = chosen(seen.prediction, gone)
        elif self.output is not None:  # a policy that never looked at the logits: a broken head must not answer, and
            # that is known only now, by a second host sync
            answer = run.exits[seen.depth](pooled[gone])
            finite = answer.isfinite().all(-1)
            confirmed = run.policy.confirm({k: v[gone] for k, v in self.state.items()}, answer)
            sure = finite if confirmed is None else finite & confirmed
            if not bool(sure.all()):
                run.stats.nonfinite += int((~finite).sum())
                stop = stop.index_fill(0, gone[~sure], False)
                gone, answer = gone[sure], answer[sure]
                if not gone.numel():
                    return None
        return self.leave(seen.depth, hidden, stop, gone, answer)

    def leave(self, depth: int, hidden: Tensor, stop: Tensor, gone: Tensor, answer: Tensor | None) -> Tensor:
        """Take the rows `gone`, marked in `stop`, out of the batch; returns the indices of those that go on."""
        rows = self.rows if self.rows is not None else torch.arange(len(stop), device=hidden.device)
        left = chosen(rows, gone)
        self.left.append((left, self.leaving(hidden, gone), answer))
        self.exited.append(depth)
        if len(gone) == len(stop):  # nothing is asked about rows any more
            kept = self.rows = gone[:0]
            self.state, self.previous = {}, None
            return kept
        kept, self.rows, *rest = compact(~stop, rows, *self.state.values(), count=len(stop) - len(gone))
        self.state = dict(zip(self.state, rest, strict=True))
        if self.previous is not None:
            self.previous = self.previous[kept]
        return kept

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what heads read of the rows that are left; overridden where that needs more than the state."""
        return self.run.backbone.pool(hidden)

    def leaving(self, hidden: Tensor, gone: Tensor) -> Tensor:
        """Return what is kept of the states of rows that leave; overridden where only their answers are."""
        return chosen(hidden, gone)

    def restore(self, hidden: Tensor) -> Tensor:
        """Return the whole batch in order: rows that ran to the end and the exit states of those that left."""
        if self.rows is None:
            return hidden
        if len(self.left) == 1 and not hidden.shape[0]:
            return self.left[0][1]
        full = hidden.new_empty((self.batch, *hidden.shape[1:]))
        full[self.rows] = hidden
        for rows, state, _ in self.left:
            full[rows] = state
        return full

    def answer(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Put the heads' predictions of rows that left early into the model's own output.

        Tied heads call the same module in the middle of a forward; only the call after the last block is its own.
        """
        if not self.through or not self.left:
            return None
        output = output.clone()
        for rows, _, prediction in self.left:
            if prediction is not None:
                output[rows] = prediction.to(output.dtype)
        return output
