"""One attention of its own over the states at the exit, then norm and the backbone's unembedding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import Around, ExitHead, HeadContext

#: positions whose rotation is kept: 32k of them take 16 MB at a head size of 64
TABLE = 32768


@register("adapter")
class Adapter(ExitHead):
    """Norm, causal attention with rotary positions and keys and values of its own, residual, norm, tied unembedding.

    heads: number of attention heads (0: as many of 64 as fit, at least 1); theta: base of the rotary frequencies.
    4 * width^2 trainable numbers per exit and no MLP: in the paper both dropping it and sharing the unembedding are
    best. Meant for one shallow exit and the draft rule "confident". Paper: Kangaroo, arXiv 2404.18911.
    """

    mixes = True

    def __init__(self, base: HeadContext, heads: int, theta: float) -> None:
        super().__init__()
        self.exit_norm = copy.deepcopy(base.norm)
        self.mix_norm = copy.deepcopy(base.norm)
        self.share(base)
        width = base.width
        self.heads = heads or max(1, width // 64)
        if self.heads < 1 or width % self.heads or width // self.heads % 2:
            raise BadArgument(
                f"adapter: heads={heads!r} does not cut a width of {width} into equal, even parts; leave heads out"
            )
        self.theta = float(theta)
        #: cosines and signed sines [TABLE, 2 * size], made when first needed; no buffer, so that no file holds it
        self.table = torch.empty(0)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # the residual starts empty: untrained, this is the logit lens

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, heads: int = 0, theta: float = 10000.0) -> Adapter:
        """Start as the logit lens."""
        return cls(base, heads, theta)

    def mix(self, hidden: Tensor, around: Around) -> Tensor:
        """Return states [batch, new, width] that have attended to all earlier ones."""
        batch, new, width = hidden.shape
        size = width // self.heads
        parts = self.qkv(self.mix_norm(hidden)).view(batch, new, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        turned, value = self.turn(parts[:2], around.positions), parts[2]
        query, key = turned[0], turned[1]
        if around.past is not None:
            key, value = around.past.update(key, value)
        mask = _mask(new, key.shape[-2], around.mask, hidden)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        out: Tensor = hidden + self.out(seen.transpose(1, 2).reshape(batch, new, width))
        return out

    def turn(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotate [2, batch, heads, new, size] by positions [batch or 1, new]; the halves of `size` are the pairs."""
        size = states.shape[-1]
        if self.table.numel() == 0 or self.table.device != states.device or self.table.dtype != states.dtype:
            steps = torch.arange(0, size, 2, device=states.device, dtype=torch.float32)
            angles = torch.arange(TABLE, device=states.device)[:, None] * self.theta ** (-steps / size)
            cos, sin = angles.cos(), angles.sin()
            self.table = torch.cat([cos, cos, -sin, sin], 1).to(states.dtype)
        # positions past the table share its last row: drafts there are worse, and still checked
        rows = self.table.index_select(0, positions.clamp(max=TABLE - 1).flatten())
        cos, sin = rows.view(len(positions), 1, -1, 2 * size).chunk(2, -1)
        return torch.addcmul(states * cos, states.roll(size // 2, -1), sin)

    def features(self, hidden: Tensor) -> Tensor:
        """Return the normed state."""
        out: Tensor = self.exit_norm(hidden)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map mixed states [..., width] to logits [..., classes]."""
        return self.unembed(self.features(hidden))


def _mask(new: int, slots: int, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Return which slots each new state sees: bool, broadcast to [batch, heads, new, slots]; None for all."""
    if padding is not None and padding.dim() == 3:
        return padding[:, None]
    if new == 1 and padding is None:
        return None
    seen = torch.ones(new, slots, dtype=torch.bool, device=like.device).tril(slots - new)
    if padding is None:
        return seen
    # a padded state sees itself at least: attention over nothing is NaN
    return (seen & padding[:, None, None, :].bool()) | torch.eye(new, slots, dtype=torch.bool, device=like.device).roll(
        slots - new, 1
    )
