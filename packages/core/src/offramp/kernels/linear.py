"""A linear layer for the few states of a decoding step, where what takes time is reading its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import not_built, say, select


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return hidden @ weight.T + bias, [..., classes], in the type of `hidden`.

    hidden: [..., width]; weight: [classes, width]; bias: [classes] or None, all of one float type. Sums are float32.
    Raises `BadArgument` for shapes that do not fit.
    """
    width, classes = (weight.shape[1], weight.shape[0]) if weight.dim() == 2 else (-1, -1)
    if hidden.shape[-1:] != (width,) or (bias is not None and bias.shape != (classes,)):
        raise BadArgument(
            f"linear takes hidden [..., width], weight [classes, width] and bias [classes], not {list(hidden.shape)}, "
            f"{list(weight.shape)}" + ("" if bias is None else f" and {list(bias.shape)}")
        )
    return select("linear", reference, hidden, weight, *([] if bias is None else [bias]))(hidden, weight, bias)


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` with torch."""
    return torch.nn.functional.linear(hidden, weight, bias)


def in_cpp(graph: Any) -> Any:
    """Return a copy of a recording (of `torch.jit.trace`, on tensors of a CPU) whose linear layers are this op in C++,
    equal up to rounding; the recording itself, with a warning, where that does not compile."""
    why = not_built("linear")
    if why is not None:
        say("linear", "cpp", why)
        return graph
    copied = graph.graph.copy()
    for node in list(copied.findAllNodes("aten::linear")):
        made = copied.create("offramp::linear", list(node.inputs()), 1)
        made.insertBefore(node)
        made.output().setType(node.output().type())
        node.output().replaceAllUsesWith(made.output())
        node.destroy()
    return torch._C._create_function_from_graph("in_cpp", copied)
