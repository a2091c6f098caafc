"""Every way to build a policy wrongly: what was given, what is allowed, and the line to write."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument, OfframpError, UnknownName
from offramp.policy import Evidence


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "confidence",
            {"threshold": 1.5},
            r'confidence: threshold 1.5 is outside \[0, 1\].*offramp.enable\(model, "never"\)',
        ),
        ("confidence", {"threshold": -0.1}, r"-0.1 is outside \[0, 1\]"),
        ("confidence", {"threshold": [0.5, 2]}, r"threshold 2 is outside"),
        ("confidence", {"threshold": float("nan")}, "nan is outside"),
        ("confidence", {"threshold": "0.9"}, "'0.9' is not a number"),
        ("confidence", {"threshold": True}, "True is not a number"),
        ("confidence", {"threshold": []}, "empty list; give one number, or one per exit"),
        ("margin", {"threshold": 1.1}, r"margin: threshold 1.1 is outside \[0, 1\]"),
        ("entropy", {"threshold": 0}, r"entropy: threshold 0 is outside \]0, 50\]"),
        ("entropy", {"threshold": float("inf")}, r"inf is outside \]0, 50\]"),
        ("entropy", {"threshold": 0.5, "normalised": "yes"}, "normalised must be True or False"),
        ("saturation", {"threshold": -1.5}, r"saturation: threshold -1.5 is outside \[-1, 1\]"),
        ("patience", {"patience": 0}, 'patience must be a whole number of exits, at least 1, not 0.*"never"'),
        ("patience", {"patience": 1.5}, "not 1.5"),
        ("patience", {"patience": True}, "not True"),
        ("fixed", {"depth": 0}, "fixed: depth must be a whole number of blocks, at least 1, not 0"),
        ("fixed", {"depth": 0.5}, "not 0.5"),
        ("speculative_gate", {"threshold": 1.0}, r'threshold 1 is outside \[0, 1\[.*offramp.enable\(model, "never"\)'),
        ("speculative_gate", {"online": True}, "online=True adds to layers="),
        (
            "decaying",
            {"inner": "entropy", "threshold": 0.5, "length": 4},
            "Entropy has no threshold in .*wrap confidence",
        ),
        ("decaying", {"inner": {"policy": "never"}, "length": 4}, "Never has no threshold"),
        (
            "decaying",
            {"inner": 0.9, "length": 4},
            r'0.9 is not a policy; give offramp.policy\("confidence", threshold=0.9\)',
        ),
        ("decaying", {"inner": "confidence", "length": 4}, "threshold"),
        (
            "decaying",
            {"inner": {"policy": "confidence", "threshold": 0.5}, "threshold": 0.4, "length": 4},
            "give threshold=0.4 to the inner policy",
        ),
        (
            "decaying",
            {"inner": "confidence", "threshold": 0.5, "length": 0},
            "length must be a whole number of positions",
        ),
        (
            "decaying",
            {"inner": "confidence", "threshold": 0.5, "length": 4, "tau": -1},
            "tau must be a number >= 0, not -1",
        ),
        ("all_of", {"policies": []}, "all_of: policies must be a non-empty list"),
        ("any_of", {"policies": "confidence"}, "any_of: policies must be a non-empty list"),
        ("any_of", {"policies": ["confidence"]}, "any_of: 'confidence' is not a policy; give"),
        ("at_least", {"inner": {"policy": "never"}, "depth": 0}, "at_least: depth must be a whole number of blocks"),
        ("at_least", {"inner": {"threshold": 0.5}, "depth": 2}, "is not a policy"),
        ("tempered", {"inner": {"policy": "never"}, "temperature": 0}, "temperature 0 is not a number above 0"),
        ("tempered", {"inner": {"policy": "never"}, "temperature": [1.0, "x"]}, "'x' is not a number above 0"),
        ("tempered", {"inner": {"policy": "never"}, "temperature": []}, "empty list"),
    ],
)
def test_bad_values(name, options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("confidense", {"threshold": 0.9}, "no ExitPolicy is called 'confidense'; did you mean 'confidence'"),
        ("confidence", {"treshold": 0.9}, "has no option 'treshold'; did you mean 'threshold'"),
        ("confidence", {}, "takes .*threshold"),
        ("at_least", {"inner": {"policy": "confidense", "threshold": 0.5}, "depth": 2}, "did you mean 'confidence'"),
    ],
)
def test_bad_names(name, options, message):
    with pytest.raises(UnknownName, match=message):
        offramp.policy(name, **options)


def test_one_threshold_per_exit_means_exactly_that():
    offramp.policy("margin", threshold=[0.5, 0.4]).check((2, 4))
    for wrap in (lambda p: p, lambda p: offramp.policy("at_least", inner=p, depth=2)):
        with pytest.raises(BadArgument, match=r"Margin was given 2 thresholds for 3 exits \(at \[2, 4, 6\]\)"):
            wrap(offramp.policy("margin", threshold=[0.5, 0.4])).check((2, 4, 6))


def test_a_statistic_that_was_not_asked_for_says_how_to_ask():
    with pytest.raises(
        OfframpError, match=r"'top1' was not computed \(have: margin\).*needs = frozenset\(\{'top1'\}\)"
    ):
        offramp.policy("confidence", threshold=0.5).step(
            {}, Evidence(0, 2, True, True, stats={"margin": torch.zeros(1)})
        )


def test_policies_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        offramp.policy("confidence", threshold=0.5).threshold = 0.9
