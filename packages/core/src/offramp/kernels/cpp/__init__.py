"""Ops in C++, for the CPU: `<op>.py` says when, `<op>.cpp` is compiled at the first call (`_build`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("offramp", "FRAGMENT")


def define(schema: str, like: Callable[..., Any]) -> None:
    """Make an operator of torch's, so that recordings and compiled graphs hold the call, and not what it once gave.

    like: returns empty tensors of the sizes and types that a call gives. Its C++ comes later, when it is compiled.
    """
    name = _LIBRARY.define(schema)
    torch.library.register_fake(f"offramp::{name}", like)
