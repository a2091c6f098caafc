"""The scheduled executor: how deep a call goes is known before it, or found on the way.

Hooks are offramp's own and not diffusers': those run the original's weights in a deep copy, and lose the hook above
them when one is taken out of the middle. The hooks on the model itself are torch's, which lie outside `forward`, so
nothing that replaces `forward` (accelerate's offloading does, after every call of a pipeline) can drop them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.blocks import BlockHook, BlockSpec, Call, Chain
from offramp.engine import decide, look
from offramp.errors import BadArgument
from offramp.kernels.compact import compact
from offramp.policy import Evidence, SchedulePolicy, State
from offramp_diffusers import _compat
from offramp_diffusers.facts import cut, without
from offramp_diffusers.head import through

if TYPE_CHECKING:
    from offramp.backbone import Undo
    from offramp.enable import Run
    from offramp_diffusers.backbones.transformer import TransformerBackbone
    from offramp_diffusers.facts import Stream


class Denoise:
    """Drives one call of the user's own denoiser; bound methods are hooked in, so a deep copy of the model works too.

    Rows that are done stay where they are, and later blocks run on the others alone. What the output layers read of a
    row is what came into the first block that it did not run: with whatever the model adds between blocks (ControlNet)
    up to there, and nothing of what it adds after.
    """

    def __init__(self, run: Run, backbone: TransformerBackbone) -> None:
        self.run, self.backbone = run, backbone
        self.chain, self.streams, self.depth = backbone.chain(), backbone.streams, backbone.depth
        self.schedule = run.policy if isinstance(run.policy, SchedulePolicy) else None
        self.index = {} if self.schedule else {depth: i for i, depth in enumerate(run.exits.at)}
        #: depths whose exits say anything else than the model's own output layers would
        self.acting = [depth for depth in run.exits.at if getattr(run.exits[depth], "acts", False)]
        heads: list[Any] = [run.exits[depth] for depth in self.acting]
        own = {name for head in heads for name in head.layers}
        #: output layers that exits have copies of
        self.output = {n: m for n, m in run.model.named_children() if n in own}
        #: whether the policy asks heads how wrong the answer from here would be
        self.estimates = "uncertainty" in run.policy.statistics()
        self.forget()

    def forget(self) -> None:
        """Drop everything that belongs to one call."""
        self.active = False
        self.batch = self.ran = 0
        #: depth of the whole batch, where it is one and known; where blocks run again after it (the way up of a U); and
        #: height and width of the image; depth of every row, where they differ or are found
        self.stop: int | None = None
        self.resume = self.depth
        self.size: tuple[int, int] | None = None
        #: noise levels [rows or 1] of a call, on the host; from `start` on [rows], where the batch is
        self.levels = self.depths = torch.empty(0)
        #: rows that blocks run on, and that the policy is asked about, None for all; rows that leave before a block,
        #: and that come back there, with the depth they left at, by its index
        self.rows: Tensor | None = None
        self.asked: Tensor | None = None
        self.leaving: dict[int, Tensor] = {}
        self.returning: dict[int, tuple[int, Tensor]] = {}
        #: what the output layers, or the blocks on the way up, are to read of rows that left
        self.kept: Tensor | None = None
        self.state: State = {}
        self.previous: Tensor | None = None

    def install(self) -> Undo:
        """Hook blocks, the model's call and its reader; returns the exact undo."""
        model = self.run.model
        self.removes: list[Undo] = [self.chain.install(self.block)]
        last = Chain(list(self.output.values()), BlockSpec())
        self.removes.append(last.install(self.answer))
        self.mine: list[BlockHook] = [*last.hooks, *self.chain.hooks]
        handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
            self.backbone.reader().register_forward_pre_hook(self.read, with_kwargs=True),
        ]
        self.removes += [handle.remove for handle in handles]
        return self.uninstall

    def uninstall(self) -> None:
        """Remove every hook, last one first; hooks that others put on top of ours stay."""
        tops: list[tuple[nn.Module, Any]] = []
        for hook in self.mine:
            now = hook.module.__dict__.get(hook.place)
            if now != hook.forward and _compat.take_out(hook.module, hook.forward, hook.original):
                tops.append((hook.module, now))
        while self.removes:
            self.removes.pop()()
        for module, forward in tops:
            module.__dict__["forward"] = forward

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forget an earlier call, also one that raised, and find out how deep this one goes."""
        self.chain.reset()
        self.forget()
        if self.run.paused:
            return
        _compat.check_hooks(self.mine, self.chain.blocks[0], self.run.exits.head if self.acting else None)
        self.active, self.size = True, self.backbone.size(module, args, kwargs)
        if self.schedule is not None:
            depths = [self.schedule.windows(at, self.depth)[0][1] for at in self.backbone.noise(args, kwargs)]
            if len(set(depths)) == 1:
                self.halt(depths[0])
            else:
                self.depths = torch.tensor(depths)
        elif self.estimates:
            self.levels = torch.tensor(self.backbone.noise(args, kwargs), dtype=torch.float64)

    def halt(self, depth: int) -> None:
        """Let the whole batch stop at a depth."""
        self.stop, self.resume = depth, self.backbone.resume(depth)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count the rows of a call that went through; one that raised has no output."""
        if output is not None and self.active and self.batch:
            stats, stop = self.run.stats, self.stop
            stats.blocks_run += self.ran
            stats.blocks_full += self.batch * self.depth
            stats.last_depths = self.depths.cpu() if stop is None else torch.full((self.batch,), stop)
            if stop is None or torch.compiler.is_compiling():  # a model compiled whole would be compiled for each count
                stats.count(stats.last_depths)
            else:
                stats.add(stop, self.batch)
        self.forget()

    def block(self, index: int, call: Call) -> Any:
        """Run one block on the rows that are left, or hand on what came in."""
        if index == 0 and self.batch:
            self.forget()  # of a call that Ctrl-C ended: torch runs no hook then
        if not self.active:
            return call.run()
        stream = self.streams[index]
        if not self.batch:  # not always block 0: skip-layer guidance may leave that one out
            self.start(stream.read(call))
        if index in self.leaving:
            self.leave(self.leaving.pop(index), stream.read(call), index)
        if self.stop is not None:
            return self.halted(index, call)
        if index in self.returning:
            call = self.come_back(*self.returning.pop(index), call, stream)
        rows = self.rows
        if rows is not None and not rows.numel():
            return stream.skip(call)
        output = call.run() if rows is None else stream.run_rows(call, rows)
        self.ran += self.batch if rows is None else rows.numel()
        if index + 1 in self.index and (self.asked is None or self.asked.numel()):
            self.exit(index + 1, stream.facts.state_of(output))
        return output

    def halted(self, index: int, call: Call) -> Any:
        """Run or skip one block of a call whose whole batch stops at one depth."""
        stream = self.streams[index]
        if index < int(self.stop or 0) or index >= self.resume:
            self.ran += self.batch
            if self.kept is None or index < self.resume:
                return call.run()
            kept, self.kept = self.kept, None
            if self.stop in self.acting:
                size = self.backbone.size(self.chain.blocks[index], call.args, call.kwargs)
                kept = through(self.run.exits[int(self.stop or 0)], kept, size)
            return stream.on(call, kept).run()
        if self.kept is None:
            self.kept = stream.read(call)
        return stream.skip(call)

    def start(self, hidden: Tensor) -> None:
        """Begin a batch: every row is in; rows whose depth is known leave before the block after it."""
        self.batch = hidden.shape[0]
        if self.stop is not None:
            return
        if self.schedule is None:
            self.depths = torch.full((self.batch,), self.depth, dtype=torch.long, device=hidden.device)
            if self.estimates:
                if len(self.levels) not in (1, self.batch):
                    raise self._mismatch(len(self.levels))
                self.levels = self.levels.to(hidden.device).expand(self.batch)
            self.state = self.run.policy.start(self.batch, hidden.device)
            return
        if len(self.depths) != self.batch:
            raise self._mismatch(len(self.depths))
        for depth in self.depths.unique().tolist():
            if depth < self.depth:
                self.leaving[depth] = (self.depths == depth).nonzero().squeeze(-1).to(hidden.device)

    def _mismatch(self, count: int) -> BadArgument:
        return BadArgument(f"this call has {count} noise levels for a batch of {self.batch}; give one, or one per row")

    def leave(self, rows: Tensor, hidden: Tensor, depth: int) -> None:
        """Keep the state of rows that are done for the output layers."""
        if rows.numel() == self.batch:  # all at once: no copy
            self.kept = hidden
            return self.halt(depth)
        if self.backbone.image:
            raise BadArgument(
                f"rows of this call would leave at different blocks, and in {type(self.run.model).__name__} states of "
                f"different blocks have different sizes; use a policy that treats all rows alike: time_schedule, fixed"
            )
        self.kept = torch.zeros_like(hidden) if self.kept is None or self.kept.shape != hidden.shape else self.kept
        self.kept = self.kept.index_copy(0, rows, hidden.index_select(0, rows))
        if (again := self.backbone.resume(depth)) < self.depth:
            self.returning[again] = depth, rows
        same = self.asked is self.rows
        self.rows = without(self.rows, rows, self.batch)
        self.asked = self.rows if same else without(self.asked, rows, self.batch)

    def come_back(self, depth: int, rows: Tensor, call: Call, stream: Stream) -> Call:
        """Let rows that left at a depth on the way down run again from here, on the state that they left with."""
        state = self.kept.index_select(0, rows)  # type: ignore[union-attr]  # they left
        if depth in self.acting:
            state = through(self.run.exits[depth], state, self.size)
        on = rows if self.rows is None else torch.cat([self.rows, rows]).sort().values
        whole = on.numel() == self.batch
        self.rows, self.kept = (None, None) if whole else (on, self.kept)
        return stream.on(call, stream.read(call).index_copy(0, rows, state))

    def exit(self, depth: int, hidden: Tensor) -> None:
        """Ask the policy at one exit; rows that stop leave before the next block."""
        run, rows = self.run, self.asked
        states = hidden if rows is None else hidden.index_select(0, rows)
        pooled = self.backbone.pool(states)
        needs = run.policy.statistics() - {"uncertainty"}
        seen = look(run, self.index[depth], pooled, self.previous, needs=needs)
        if self.estimates:
            seen = self.estimate(seen, states, rows)
        stop, self.state, finite = decide(run.policy, self.state, seen)
        self.previous = pooled if run.looks_back else None
        counts = torch.stack([stop.sum(), finite.numel() - finite.sum()]).tolist()  # the one host sync of an exit
        run.stats.nonfinite += counts[1]
        if not counts[0]:
            return
        gone = compact(stop, count=counts[0])[0]
        left, *rest = compact(~stop, *self.state.values(), count=len(stop) - counts[0])
        self.leaving[depth] = gone if rows is None else rows[gone]
        self.depths = self.depths.index_fill(0, self.leaving[depth], depth)
        self.state = dict(zip(self.state, rest, strict=True))
        if self.previous is not None:
            self.previous = self.previous[left]

    def estimate(self, seen: Evidence, states: Tensor, rows: Tensor | None) -> Evidence:
        """Return the evidence with what the exit's head says of its own error."""
        levels = self.levels if rows is None else self.levels[rows]
        head: Any = self.run.exits[seen.depth]
        return replace(seen, stats={**seen.stats, "uncertainty": head.uncertainty(states, levels)})

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the output layers read the states that rows left with."""
        if self.kept is None or not args or self.kept.shape != args[0].shape:  # a model that cut its text off since
            return None
        if self.resume < self.depth:  # a cache on top added what blocks on the way up would, as for rows in `returning`
            return None
        given, state = args[0], self.kept.to(args[0].dtype)
        for depth, mine in self.groups(state.device).items():
            if depth in self.acting and self.backbone.resume(depth) == self.depth:
                head, part = self.run.exits[depth], state if mine is None else state.index_select(0, mine)
                part = through(head, part, self.size)
                state = part if mine is None else state.index_copy(0, mine, part)
        for rows in (self.rows, *(mine for _, mine in self.returning.values())):
            if rows is not None and rows.numel():
                state = state.index_copy(0, rows, given.index_select(0, rows))
        return (state, *args[1:]), kwargs

    def groups(self, device: torch.device) -> dict[int, Tensor | None]:
        """Return the rows of a batch, on a device, by the depth they left at; None for all of them."""
        depths = [self.stop] if self.stop is not None else self.depths.unique().tolist()
        if len(depths) == 1:
            return {int(depths[0]): None}
        return {d: (self.depths == d).nonzero().squeeze(-1).to(device) for d in depths}

    def answer(self, index: int, call: Call) -> Any:
        """Run one output layer: each row's is that of the exit it left at."""
        name, exits = list(self.output)[index], self.run.exits
        groups = self.groups(call.args[0].device) if self.active and self.batch else {}
        heads: dict[int, Any] = {depth: exits[depth] for depth in groups if depth in self.acting}
        layers = {depth: head.layers[name] for depth, head in heads.items()}
        if not layers:
            return call.run()
        answer: Tensor | None = None
        for depth, rows in groups.items():
            layer = layers.get(depth, call.original)
            if rows is None:
                return layer(*call.args, **call.kwargs)
            given = cut(call.args, rows, self.batch), cut(call.kwargs, rows, self.batch)
            part = layer(*given[0], **given[1])
            answer = part.new_zeros(self.batch, *part.shape[1:]) if answer is None else answer
            answer = answer.index_copy(0, rows, part.expand(len(rows), *part.shape[1:]))
        return answer
