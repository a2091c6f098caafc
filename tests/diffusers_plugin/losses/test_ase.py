"""The weight of a noise level, and what it is a mean of."""

import pytest
import torch

from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Loss


def test_the_tilt_weighs_rows_by_their_level():
    said, wanted = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    wanted[1] *= 2  # squared errors 1 and 4
    level = torch.tensor([0.0, 750.0])
    assert float(create(Loss, "ase").at(said, wanted, level)) == pytest.approx(2.5)
    assert float(create(Loss, "ase", tilt=1.0).at(said, wanted, level)) == pytest.approx((2 * 1 + 0.5 * 4) / 2)


@pytest.mark.parametrize("tilt", [2, -1.5, True, "a", float("nan")])
def test_bad_tilt(tilt):
    with pytest.raises(BadArgument, match="tilt must be a number from -1 to 1"):
        create(Loss, "ase", tilt=tilt)
