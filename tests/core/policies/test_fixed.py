import pytest
import torch

import offramp
from offramp.policy import Evidence


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [True, True, True]),
        (4, [False, True, True]),
        (5, [False, False, True]),  # no exit at 5: the first deeper one
        (8, [False, False, True]),
    ],
)
def test_stops_at_the_depth_or_the_first_deeper_exit(depth, expected):
    policy = offramp.policy("fixed", depth=depth)
    seen = [Evidence(i, d, i == 0, i == 2, hidden=torch.zeros(3, 4)) for i, d in enumerate((2, 4, 8))]
    masks = [policy.step({}, s)[0] for s in seen]
    assert [m.tolist() for m in masks] == [[e] * 3 for e in expected]


def test_deeper_than_every_exit_is_refused():
    offramp.policy("fixed", depth=8).check((2, 8))
    with pytest.raises(offramp.OfframpError, match="depth 9 is deeper than every exit .*could never fire"):
        offramp.policy("fixed", depth=9).check((2, 8))


def test_ladder_goes_from_deep_to_shallow():
    assert [p.depth for p in offramp.policy("fixed", depth=2).ladder((2, 4, 8), 7)] == [8, 4, 2]
