"""FREE's training: depths as weights, and which state learns from which."""

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Moment, Schedule


def made(**options):
    return create(offramp.Loss, "layerwise_distill", **options)


@pytest.mark.parametrize(
    ("depth", "shallow", "teachers"),
    [
        (24, 6, [3, 7, 11, 15, 19, 23]),
        (24, 8, [2, 5, 8, 11, 14, 17, 20, 23]),
        (24, 4, [5, 11, 17, 23]),
        (12, 3, [3, 7, 11]),
    ],
)
def test_teachers_are_those_of_the_paper(depth, shallow, teachers):
    """The paper counts blocks from 0; a tap is a number of blocks, one more."""
    wanted = {t + 1 for t in teachers} | set(range(1, shallow + 1))
    assert set(made().taps([shallow], depth)) | {depth} == wanted


def test_exits_and_last_layer_weigh_their_depths():
    """(S * CE_S + L * CE_L) / (S + L), here with S = 2, L = 6."""
    exit, final, targets = torch.randn(7, 5), torch.randn(7, 5), torch.randint(5, (7,))
    found = made()([exit], final, targets, moment=Moment(depths=(2, 6)))
    wanted = (2 * cross_entropy(exit, targets) + 6 * cross_entropy(final, targets)) / 8
    assert found.item() == pytest.approx(wanted.item())


def states():
    """State k holds the number given for depth k: S = 3, L = 6, teachers 2, 4, 6."""
    return {d: torch.full((4, 8), v) for d, v in {1: 0.0, 2: 5.0, 3: 4.0, 4: 1.0, 6: 3.0}.items()}


@pytest.mark.parametrize(
    ("map", "pairs"),
    [
        ("last", [(3, 6)]),
        ("unif", [(1, 2), (2, 4), (3, 6)]),
        # from the top: 6 (3.0) is nearest to state 3 (4.0), 4 (1.0) to state 1 (0.0), and 2 (5.0) may then only take 1
        ("dyna", [(3, 6), (1, 4), (1, 2)]),
    ],
)
def test_pairs_of_each_map(map, pairs):
    given = states()
    wanted = sum(float(mse_loss(given[s], given[t])) for s, t in pairs) / len(pairs)
    assert made(map=map).distance(given, 3, 6).item() == pytest.approx(wanted)


@pytest.mark.parametrize("map", ["last", "unif", "dyna"])
def test_students_learn_and_teachers_do_not(map):
    given = {d: v.requires_grad_() for d, v in states().items()}
    made(map=map).distance(given, 3, 6).backward()
    assert given[3].grad.abs().sum() > 0 and given[6].grad is None and given[4].grad is None


def test_the_distance_is_added_with_its_share():
    exit, final, targets = torch.randn(4, 5), torch.randn(4, 5), torch.randint(5, (4,))
    plain = made()([exit], final, targets, moment=Moment(depths=(3, 6)))
    loss = made(share=0.25, map="last")
    both = loss([exit], final, targets, moment=Moment(depths=(3, 6), states=states()))
    assert both.item() == pytest.approx(plain.item() + 0.25 * 1.0)


@pytest.mark.parametrize("map", ["last", "unif", "dyna"])
def test_fit_gives_it_the_states(model, map):
    """The first step's loss is what the states before it say."""
    x = torch.randn(16, 3, 8)
    data = {"x": x, "labels": (x[:, 0, 0] > 0).long()}
    exits = offramp.attach(model, [3], head="shared")
    with torch.no_grad():
        found = exits.backbone.observe(data, [1, 2, 3, 4])
        kept = {**dict(zip([1, 2, 3, 4], found.hidden, strict=True)), 6: found.final}
        readout = exits.backbone.context().readout
        loss = made(map=map, share=0.5)
        moment = Moment(0.8, (3, 6), kept)
        wanted = loss([readout(kept[3])], readout(kept[6]), data["labels"], moment=moment)
        assert float(loss.distance(kept, 3, 6)) > 0.01
    schedule = Schedule("linear", 0.8, 1.0, 10)
    given = {"batch_size": 16, "steps": 3, "weights": schedule, "progress": False}
    report = offramp.fit(model, data, loss=loss, backbone=True, **given)
    assert report.losses[0] == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"), [({"share": -1}, "share must be a number from 0"), ({"map": "first"}, "last, unif, dyna")]
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(BadArgument, match=message):
        made(**options)


def test_it_needs_the_backbone_and_labels(model, x):
    offramp.attach(model, [2], head="tied")
    with pytest.raises(BadArgument, match=r"trains states of the model itself; add backbone=True"):
        offramp.fit(model, x, loss="layerwise_distill", progress=False)
    with pytest.raises(BadArgument, match="needs labels"):
        offramp.fit(model, x, loss="layerwise_distill", backbone=True, progress=False)


def test_without_exits_it_has_nothing_to_train(model):
    schedule = offramp.policy("position_schedule", max_depth=4, min_depth=2, length=4)
    with pytest.raises(BadArgument, match="trains exits, and there are none"):
        offramp.fit(model, torch.randn(4, 3, 8), loss="layerwise_distill", backbone=True, schedule=schedule)
