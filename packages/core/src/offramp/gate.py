"""The contract of a gate: a small trained module beside the exits that turns what is seen at one into a probability."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import BadArgument

#: what a gate is given where nobody looked at a prediction
NOTHING: Mapping[str, Tensor] = {}


class ExitGate(nn.Module):
    """Says at every exit how likely it is that a row may stop there; a policy reads it as one more statistic.

    Subclass in a file of the gate's own name under `gates/` and decorate with `@register("name")`. One module serves
    all exits of a model and lives at `model.exits.gate`; no gradient of it reaches heads or backbone. Only a gate that
    must spare its head from running, and so asks parts of it, is a part of the head instead (`speculative`).
    """

    #: the name under which evidence and traces hold what it says
    statistic: ClassVar[str]
    #: the loss that trains it: `offramp.fit(model, data, loss=...)`
    loss: ClassVar[str]
    #: statistics of the head's prediction that it reads; the head then runs at every exit
    needs: ClassVar[frozenset[str]] = frozenset()
    #: whether it reads the state at the exit before too
    looks_back: ClassVar[bool] = False
    #: the parameter that is zero until the gate has been trained, so that an untrained one is recognised, and refused
    zero: ClassVar[str] = "weight"

    @property
    def trained(self) -> bool:
        """Whether the gate has been trained (or loaded)."""
        return bool(self.get_parameter(type(self).zero).any())

    @classmethod
    @abstractmethod
    def build(cls, width: int, exits: int, *args: Any, **config: Any) -> ExitGate:
        """Build a fresh gate for `exits` exits whose states are `width` wide; raises `BadArgument`."""

    @abstractmethod
    def log_odds(
        self,
        hidden: Tensor,
        index: int = 0,
        previous: Tensor | None = None,
        stats: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Map what is seen at exit `index` to log-odds [...] in float32.

        hidden: [..., width]; previous: the state at the exit before, None at the first; stats: [...] by name, those of
        `needs`.
        """

    def forward(
        self,
        hidden: Tensor,
        index: int = 0,
        previous: Tensor | None = None,
        stats: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Return the probability [...] in float32; arguments as for `log_odds`."""
        return self.log_odds(hidden, index, previous, stats).sigmoid()


def normed(hidden: Tensor) -> Tensor:
    """Return states [..., width] in float32 with mean 0 and variance 1, so that exits whose states differ in scale can
    share weights."""
    return functional.layer_norm(hidden.detach().float(), hidden.shape[-1:])


def whole(name: str, value: Any, owner: str) -> int:
    """Return an option that must be a whole number above 0; raises `BadArgument`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadArgument(f"gate {owner!r}: {name} must be a whole number above 0, not {value!r}")
    return value
