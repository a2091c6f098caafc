"""Put rows back where they came from: the undo of `compact`."""

from __future__ import annotations

from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels._select import select


def scatter(index: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Write `values` [n, ...] into the rows `index` int64 [n] of `out` [rows, ...], in place, and return `out`.

    The other rows stay; `values` is cast to the type of `out`. No number may come twice. Raises `BadArgument` for rows
    that do not exist; on a GPU, where looking would wait for the device, they are passed over.
    """
    if index.dim() != 1 or values.shape[:1] != index.shape or values.shape[1:] != out.shape[1:]:
        raise BadArgument(
            f"scatter takes index [n], values [n, ...] and out [rows, ...], not {list(index.shape)}, "
            f"{list(values.shape)} and {list(out.shape)}"
        )
    return select("scatter", reference, index, values, out)(index, values, out)


def reference(index: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Compute `scatter` with torch."""
    try:
        return out.index_copy_(0, index, values.to(out.dtype))
    except (IndexError, RuntimeError) as error:
        if "out of range" not in str(error) and "out of bounds" not in str(error):
            raise
        raise BadArgument(f"scatter: index must name rows of out, 0 to {len(out) - 1}: {error}") from error
