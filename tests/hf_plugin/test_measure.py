"""Measuring: interleaved, warmed, in rotating order, and rows whose numbers are what happened."""

import gc
import json
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import offramp
from offramp.enable import RUN, Stats
from offramp_hf import measure
from offramp_hf.measure import Generate, Timed, counts, interleaved, quartiles, rows

NEW = 9


@pytest.fixture
def model():
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=4, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    made = LlamaForCausalLM(config).eval()
    offramp.attach(made, at=[1, 2])
    return made


@pytest.fixture
def prompts():
    return [torch.randint(3, 61, (1, 5)) for _ in range(3)]


def ways_of(model):
    everything = offramp.policy("confidence", threshold=0.0)
    return [
        Generate("generate", model, NEW),
        Generate("never", model, NEW, "never"),
        Generate("verified", model, NEW, everything, {"verify": True}),
        Generate("calibrated", model, NEW, everything),
        Generate("assistant_early_exit", model, NEW, arguments={"assistant_early_exit": 2}),
    ]


def measured(model, prompts):
    ways = ways_of(model)
    timed = interleaved({w.name: w for w in ways}, prompts, warm=1)
    return {row["name"]: row for row in rows(ways, timed, prompts, depth=4)}


def test_ways_take_turns_and_the_order_rotates():
    order = []
    ways = {name: (lambda item, name=name: order.append((item, name)) or item) for name in "abc"}
    found = interleaved(ways, [0, 1, 2], warm=1)
    assert order[:3] == [(0, "a"), (0, "b"), (0, "c")]  # the warm-up, not measured
    assert order[3:6] == [(0, "a"), (0, "b"), (0, "c")]
    assert order[6:9] == [(1, "b"), (1, "c"), (1, "a")]
    assert order[9:] == [(2, "c"), (2, "a"), (2, "b")]
    assert {name: [t.result for t in one] for name, one in found.items()} == dict.fromkeys("abc", [0, 1, 2])


def test_getting_ready_is_not_timed_and_statistics_start_after_the_warm_up():
    class Way:
        def __init__(self):
            self.stats, self.inside, self.seen = Stats(), False, []

        @contextmanager
        def ready(self):
            self.inside = True
            yield
            self.inside = False

        def __call__(self, item):
            self.seen.append((self.inside, gc.isenabled()))
            self.stats.tokens += 1
            return item

    way, steps = Way(), []
    interleaved({"way": way}, [1, 2], warm=2, step=lambda: steps.append(1))
    assert way.seen == [(True, False)] * 4 and way.stats.tokens == 2 and len(steps) == 2
    assert gc.isenabled() and not way.inside


def test_an_error_leaves_everything_as_it_was(model):
    def broken(item):
        raise KeyError(item)

    way = Generate("verified", model, NEW, "never")
    way.arguments = {"stopping_criteria": [broken]}
    with pytest.raises((KeyError, TypeError, ValueError)):
        interleaved({"way": way}, [torch.tensor([[3, 4]])], warm=0)
    assert gc.isenabled() and RUN not in model.__dict__


def test_rows(model, prompts):
    found = measured(model, prompts)
    json.dumps(found)
    generate = found["generate"]
    assert generate["speedup"] == 1.0 and generate["identical"] and generate["tokens"] == 3 * NEW
    assert generate["blocks_run"] == generate["blocks_full"] == 3 * NEW * 4 and generate["saved"] == 0.0
    assert found["never"]["identical"] and found["never"]["blocks_run"] == generate["blocks_run"]
    assert found["verified"]["identical"] and found["verified"]["agreement"] == 1.0
    assert found["assistant_early_exit"]["identical"] and found["assistant_early_exit"]["saved"] is None
    for row in found.values():
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0 and row["prompts"] == 3
        low, middle, high = row["speedup_quartiles"]
        assert low <= middle == row["speedup_median"] <= high
    assert RUN not in model.__dict__


def test_bound_counts_the_blocks_of_a_round(model, prompts):
    row = measured(model, prompts)["verified"]
    g = row["tokens"] / row["rounds"]
    assert row["tokens_per_round"] == g
    beyond = row["blocks_run"] / row["rounds"] - 4
    assert row["bound"] == pytest.approx(4 * g / (4 + beyond))
    assert row["of_bound"] == pytest.approx(row["speedup"] / row["bound"])
    if row["drafted"]:
        assert 1 - 1e-9 <= row["draft_depth"] <= 3 + 1e-9
        assert beyond == pytest.approx(row["drafted_per_round"] * row["draft_depth"])


def test_lossy_rows_tell_how_often_they_agree(model, prompts):
    row = measured(model, prompts)["calibrated"]
    assert not row["identical"] and 0.0 <= row["agreement"] < 1.0
    assert sum(row["exits"].values()) == row["tokens"] and set(row["exits"]) <= {"1", "2", "4"}
    assert row["saved"] == pytest.approx(1 - row["blocks_run"] / row["blocks_full"])


def test_agreement_of_the_models_own_text_is_whole(model, prompts):
    way = Generate("generate", model, NEW)
    outputs = [way(p) for p in prompts]
    assert measure.agreement(model, outputs, prompts) == 1.0
    outputs[0][0, -1] = (outputs[0][0, -1] + 1) % 61
    assert measure.agreement(model, outputs, prompts) == pytest.approx(1 - 1 / (3 * NEW))


def test_blocks_are_counted_by_hooks_where_offramp_does_not_drive(model, prompts):
    plain = measure.count_blocks(Generate("generate", model, NEW), prompts)
    assert plain["blocks_run"] == plain["blocks_full"] == 3 * NEW * 4 and plain["saved"] == 0.0
    assert not any(b._forward_hooks for b in model.model.layers)


def test_speed_is_of_tokens_not_of_calls(model):
    """A way that writes half as much in half the time is not faster."""
    prompt = torch.zeros(1, 2, dtype=torch.long)
    timed = {"generate": [Timed(2.0, torch.zeros(1, 12))], "short": [Timed(1.0, torch.zeros(1, 7))]}
    ways = [Generate("generate", model), Generate("short", model, arguments={"a": 1})]
    timed = {k: [Timed(t.seconds, t.result.long()) for t in v] for k, v in timed.items()}
    assert rows(ways, timed, [prompt], depth=4)[1]["speedup"] == 1.0


def test_what_was_learned_is_kept_between_calls(model, prompts):
    way = ways_of(model)[2]
    for prompt in prompts:
        with way.ready():
            way(prompt)
    assert way.stats.tokens == 3 * NEW and way.memory


def test_quartiles():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0] and quartiles([7.0]) == [7.0] * 3


def test_counts_of_a_run_that_never_exits(model):
    assert counts(Generate("never", model, NEW, "never"), 10, 4)["bound"] == 1.0


def test_machine_names_what_matters():
    said = measure.machine()
    assert "core" in said and "thread" in said and torch.__version__ in said
