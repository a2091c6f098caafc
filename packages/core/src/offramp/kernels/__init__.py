"""Numeric kernels: one op per file, its signature and torch reference together; kernels of it in `triton/` and `cpp/`.

`OFFRAMP_KERNELS=auto|torch|cpp|triton|cuda` chooses at every call; auto is Triton for tensors of a GPU, else torch.
"""

from __future__ import annotations

from offramp.kernels._select import available as available
from offramp.kernels._select import mode as mode
from offramp.kernels._select import ops as ops
from offramp.kernels.compact import compact as compact
from offramp.kernels.fill_kv import fill_kv as fill_kv
from offramp.kernels.head_stats import head_stats as head_stats
from offramp.kernels.linear import linear as linear
from offramp.kernels.row_attention import row_attention as row_attention
from offramp.kernels.scatter import scatter as scatter
from offramp.kernels.span_margin import span_margin as span_margin
from offramp.kernels.subset_logits import subset_logits as subset_logits
from offramp.kernels.verify import verify as verify
