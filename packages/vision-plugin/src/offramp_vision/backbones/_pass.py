"""One forward of an image classifier in which images leave: only answers are kept of those that did."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.blocks import Call
from offramp.enable import Run, check_outputs
from offramp.engine import SinglePass, Undo
from offramp.errors import BadArgument


class _Settled(Exception):
    """Every image has left: what is left of the forward would run on nothing."""


class ImagePass(SinglePass):
    """The images that are left run through the rest of the model, whatever that is; answers are put back in order.

    States of images that left are not kept: blocks change their shape, and maps of early stages are large. What runs
    between blocks and after them sees only the images that are left, and when none is, the forward ends there.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run, run.model)
        self.whole = run.exits.whole
        self.now = 0

    def install(self) -> Undo:
        """Hook the blocks, and stand around the model's forward; returns the exact undo."""
        model = self.run.model
        check_outputs(self.run.policy, self.run.backbone.context().classes)
        self.before, self.original = model.__dict__.get("forward"), model.forward
        model.__dict__["forward"] = self.forward
        self.removes = [self.unwrap, self.chain.install(self.block)]
        return self.uninstall

    def unwrap(self) -> None:
        """Put the model's forward back."""
        if self.before is None:
            self.run.model.__dict__.pop("forward", None)
        else:
            self.run.model.__dict__["forward"] = self.before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, and complete its answer."""
        if self.run.paused:
            return self.original(*args, **kwargs)
        images = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(images, Tensor) and not images.is_floating_point():
            raise BadArgument(f"images of {images.dtype} are not normalised; give floats, e.g. images.float() / 255")
        self.begin(self.run.model, args)
        try:
            try:
                output = self.original(*args, **kwargs)
            except _Settled:
                output = None
            output = self.complete(output)
            self.end(self.run.model, args, output)
            return output
        finally:
            self.forget()

    def block(self, index: int, call: Call) -> Any:
        """Run one block on the images that are left; raises through the model when none is."""
        self.now = index + 1
        output = super().block(index, call)
        if self.active and self.rows is not None and not self.rows.numel():
            raise _Settled
        return output

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what the head at this exit reads."""
        if not self.whole:
            return super().pool(hidden)
        head = self.run.exits[self.now]
        if head.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in head.modules()):
            raise BadArgument(
                f"the head at depth {self.now} normalises over the batch, because it is in train mode: what an image "
                "gets would depend on the others; write model.eval() first"
            )
        return head.reduce(hidden)

    def leaving(self, hidden: Tensor, gone: Tensor) -> Tensor:
        """Return nothing of the states: only answers are kept. An empty view would keep the memory of all of them."""
        return hidden.new_empty(0)

    def restore(self, hidden: Tensor) -> Tensor:
        """Return the state of the images that are left: it goes on as it is."""
        return hidden

    def complete(self, output: Tensor | None) -> Any:
        """Return the answers of all images in order. output: of those that ran to the end, None when none did."""
        if not self.left:
            return output
        rows, _, first = self.left[0]
        if first is None or (output is not None and first.shape[1:] != output.shape[1:]):
            wanted = None if output is None else list(output.shape[1:])
            raise BadArgument(
                f"heads answer with {None if first is None else list(first.shape[1:])} numbers per image and the model "
                f"with {wanted}: its classifier was changed; detach, and attach exits to the model as it is now"
            )
        if len(rows) == self.batch:  # all at once: in order already
            return first
        like = first if output is None else output
        full = like.new_empty((self.batch, *first.shape[1:]))
        if output is not None and self.rows is not None:
            full[self.rows] = output
        for rows, _, answer in self.left:
            if answer is not None:
                full[rows] = answer.to(full.dtype)
        return full
