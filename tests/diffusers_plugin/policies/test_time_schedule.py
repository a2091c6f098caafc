"""Depth follows the noise level: the table, its bins, and what is refused."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.testing.policies import check_policy
from offramp_diffusers.policies.time_schedule import DEMO, TimeSchedule, two_stage


def test_the_default_is_the_published_table():
    plan = offramp.policy("time_schedule")
    assert [plan.depth_at(t, 28) for t in range(50, 1000, 100)] == [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]
    assert plan.depths == DEMO and plan.depth_at(1000.0, 28) == 12


def test_bins_are_closed_on_the_clean_side():
    plan = TimeSchedule((8, 4, 2), (100, 900))
    assert [plan.depth_at(t, 8) for t in (0, 99.9, 100, 899, 900, 1000)] == [8, 8, 4, 4, 2, 2]
    assert plan.windows(950.0, 8) == ((0, 2),)


def test_two_stages():
    plan = two_stage(0.25)
    assert [plan.depth_at(t, 12) for t in (0, 299, 300, 1000)] == [12, 12, 3, 3]


def test_contract_with_edges():
    check_policy(TimeSchedule((8, 2, 6, 4), (3, 5.5, 7)), (2, 4, 6, 8))


def test_config_round_trip():
    plan = TimeSchedule((1.0, 0.5), (300.0,), monotone=True)
    assert offramp.policy("time_schedule", **{k: v for k, v in plan.config().items() if k != "policy"}) == plan


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"depths": []}, "must be a list"),
        ({"depths": 4}, "must be a list"),
        ({"depths": [0]}, "neither a whole number"),
        ({"depths": [1.5]}, "neither a whole number"),
        ({"depths": [True]}, "neither a whole number"),
        ({"depths": [float("nan")]}, "neither a whole number"),
        ({"depths": [4, 2], "edges": []}, "2 depths need 1 edges"),
        ({"depths": [4, 2], "edges": [1000]}, "do not cut"),
        ({"depths": [4, 2, 1], "edges": [500, 400]}, "do not cut"),
        ({"depths": [4, 2], "edges": ["300"]}, "do not cut"),
        ({"depths": [4, 2], "edges": [float("nan")]}, "do not cut"),
        ({"depths": [2, 4], "monotone": True}, "grow with the noise"),
        ({"depths": [2, 0.5], "monotone": True}, "blocks only, or fractions only"),
    ],
)
def test_bad_tables(options, match):
    with pytest.raises(BadArgument, match=match):
        offramp.policy("time_schedule", **options)


def test_a_table_that_is_too_deep_is_refused_before_the_first_step(dit):
    with pytest.raises(BadArgument, match="9 blocks are more than the 6 of this model"):
        offramp.enable(dit, "time_schedule", depths=[6, 9])
    assert "_offramp_run" not in dit.__dict__


def test_models_without_a_noise_level_are_refused():
    from offramp.testing.toy import ToyModel, toy_plugin

    model = ToyModel()
    with toy_plugin(), pytest.raises(BadArgument, match="goes by the noise level, and calls of ToyModel carry none"):
        offramp.enable(model, "time_schedule")


def test_fractions_cannot_be_simulated_without_a_depth():
    seen = offramp.Evidence(0, 2, True, True, position=torch.tensor([5.0]))
    with pytest.raises(BadArgument, match="write the table in blocks"):
        offramp.policy("time_schedule").step({}, seen)
