"""What LGViT's two kinds of heads share: tokens that have seen one another, their mean, and one linear layer."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from offramp.backbone import Tap
from offramp.head import ExitHead
from offramp_vision.layouts import check_grid, map_of


class Perceive(ExitHead):
    """Reads the mean of perceived tokens, plus the class token where there is one."""

    whole = True
    lens = False

    def __init__(self, name: str, tap: Tap, classes: int) -> None:
        super().__init__()
        check_grid(name, tap)
        self.place, self.prefix = (tap.layout, tap.prefix, tap.grid), tap.prefix
        self.proj = nn.Linear(tap.width, classes)

    def image(self, hidden: Tensor) -> Tensor:
        """Return the state as a map [batch, width, rows, columns], all prefix tokens left out."""
        return map_of(*self.place, hidden)

    @abstractmethod
    def perceive(self, hidden: Tensor) -> Tensor:
        """Return tokens [batch, token, width] of a state [batch, ...]."""

    def read(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return logits [batch, classes] of perceived tokens and the state that they come from."""
        seen = tokens.mean(1)
        out: Tensor = self.proj(seen + hidden[:, 0] if self.prefix else seen)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states [batch, ...] to logits [batch, classes]."""
        return self.read(self.perceive(hidden), hidden)
