"""LayerSkip's loss: the paper's weights in closed form, its curricula, and the share that is the model's own."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import offramp
from offramp._registry import create
from offramp.errors import BadArgument, UnknownName
from offramp.loss import Moment


def layerskip(**options):
    return create(offramp.Loss, "layerskip", **options)


@pytest.fixture
def rows():
    """Predictions of 4 exits, of the last layer, and labels with one missing."""
    return torch.randn(4, 6, 5).unbind(0), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])


def paper(losses, last, e_scale, taking, exits):
    """Equation by hand: exit j of K weighs e * sum(1..j+1), the last K + 1 + e * sum(1..K); then normalised."""
    weights = [e_scale * sum(range(1, j + 2)) for j in taking] + [exits + 1 + e_scale * sum(range(1, exits + 1))]
    return sum(w * value for w, value in zip(weights, [*losses, last], strict=True)) / sum(weights)


@pytest.mark.parametrize("taking", [[0, 1, 2, 3], [1, 3], [2]])
@pytest.mark.parametrize("e_scale", [0.1, 1.0])
def test_weights_are_the_papers(rows, e_scale, taking):
    exits, final, targets = rows
    found = layerskip(e_scale=e_scale)([exits[j] for j in taking], final, targets, taking, 4)
    each = [cross_entropy(exits[j], targets, ignore_index=-100) for j in taking]
    wanted = paper(each, cross_entropy(final, targets, ignore_index=-100), e_scale, taking, 4)
    assert found.item() == pytest.approx(wanted.item())


def test_a_schedule_scales_the_exits_and_not_the_last_layer(rows):
    exits, final, targets = rows
    made = layerskip(e_scale=1.0)
    half = made(exits, final, targets, moment=Moment(0.5))
    each = [cross_entropy(p, targets, ignore_index=-100) for p in exits]
    last = cross_entropy(final, targets, ignore_index=-100)
    weights = [0.5, 1.5, 3.0, 5.0, 15.0]
    wanted = sum(w * v for w, v in zip(weights, [*each, last], strict=True)) / sum(weights)
    assert half.item() == pytest.approx(wanted.item())
    assert made(exits, final, targets, moment=Moment(0.0)).item() == pytest.approx(last.item())


def test_rotational_takes_every_rth_exit_and_moves_on():
    made = layerskip(curriculum="rotational", rotation=3)
    found = [list(made.active(step, 100, 8)) for step in range(4)]
    assert found == [[0, 3, 6], [1, 4, 7], [2, 5], [0, 3, 6]]
    assert [list(made.active(step, 9, 2)) for step in range(3)] == [[0], [1], [0]]  # never none


def test_gradual_opens_from_the_deepest_to_the_shallowest_in_the_first_half():
    made = layerskip(curriculum="gradual")
    found = [list(made.active(step, 16, 4)) for step in range(16)]
    assert found[0] == [3] and found[2] == [2, 3] and found[4] == [1, 2, 3] and found[7] == [0, 1, 2, 3]
    assert all(f == [0, 1, 2, 3] for f in found[7:])
    assert all(set(a) <= set(b) for a, b in zip(found[:-1], found[1:], strict=True))


def test_without_a_curriculum_all_take_part():
    assert list(layerskip(curriculum="none").active(0, 10, 3)) == [0, 1, 2]


@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
def test_own_mixes_labels_with_the_last_layer(rows, own):
    exits, final, targets = rows
    for value, p in zip(layerskip(own=own).each(exits, final, targets), exits, strict=True):
        label = cross_entropy(p, targets, ignore_index=-100)
        divergence = kl_div(p.log_softmax(-1), final.softmax(-1), reduction="batchmean")
        assert value.item() == pytest.approx((1 - own) * label.item() + own * divergence.item(), rel=1e-5)


def test_the_last_layer_is_trained_by_the_whole_and_not_by_the_exits(rows):
    exits, final, targets = rows
    final.requires_grad_()
    assert not any(v.requires_grad for v in layerskip(own=0.5).each(exits, final, targets))
    layerskip(own=0.5)(exits, final, targets).backward()
    assert final.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"e_scale": 0}, BadArgument, "e_scale must be a number above 0"),
        ({"curriculum": "sometimes"}, BadArgument, "not one of rotational, gradual, none"),
        ({"rotation": 0}, BadArgument, "rotation must be a whole number >= 1"),
        ({"own": 1.5}, BadArgument, "own must be a share from 0 to 1"),
        ({"weighting": "smu"}, UnknownName, "did you mean 'sum'"),
    ],
)
def test_what_means_nothing_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        layerskip(**options)


def test_without_labels_it_says_so(rows):
    with pytest.raises(BadArgument, match="labels=input_ids"):
        layerskip()(rows[0], rows[1])
