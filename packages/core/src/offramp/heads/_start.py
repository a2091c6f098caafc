"""How a head that copies parts of the backbone starts: from their weights, or from those of new ones."""

from __future__ import annotations

import torch
from torch import nn

from offramp.errors import BadArgument

INITS = ("copy", "random")


def check_init(name: str, init: str) -> None:
    """Raise `BadArgument` for a start that does not exist."""
    if init not in INITS:
        raise BadArgument(f"{name}: init {init!r} is not one of {', '.join(INITS)}")


@torch.no_grad()
def renew(module: nn.Module, width: int) -> None:
    """Give a copied norm, and any layer that goes with it, the weights that a new one starts with."""
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
        elif own:
            for weight in own.values():
                weight.zero_()
            # a gain that silences the norm at 0 starts at 1; one that does not is added to 1 (Gemma) and starts at 0
            probe = next(iter(own.values())).new_ones(1, width)
            if "weight" in own and not bool(part(probe).any()):
                own["weight"].fill_(1.0)
