"""Whatever is raised in the middle of a decode leaves model and caches usable and exact; undo is exact."""

import gc

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import StoppingCriteria

import offramp
from offramp.errors import NotAttached

NEW = 12
MODES = {"verify": {"verify": True, "draft": 4}, "catch_up": {}, "propagate": {"kv": "propagate"}}
MODES["recompute"] = {"kv": "recompute", "window": 5}


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


class Boom(RuntimeError):
    pass


class Fuse:
    """Raises at the k-th call."""

    def __init__(self, k, error=Boom):
        self.left, self.error = k, error

    def burn(self):
        self.left -= 1
        if self.left < 0:
            raise self.error()


class Processor(Fuse):
    def __call__(self, ids, scores):
        self.burn()
        return scores


class Criterion(Fuse, StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        self.burn()
        return torch.zeros(len(ids), dtype=torch.bool)


class Streamer(Fuse):
    def put(self, value):
        self.burn()

    def end(self):
        pass


PLACES = {
    "processor": lambda fuse: {"logits_processor": LogitsProcessorList([Processor(fuse)])},
    "criterion": lambda fuse: {"stopping_criteria": StoppingCriteriaList([Criterion(fuse)])},
    "streamer": lambda fuse: {"streamer": Streamer(fuse)},
    "shallow block": 1,
    "deep block": 4,
}


def break_at(model, place, fuse):
    """Arguments of a call that raises, and what puts the model back."""
    if callable(PLACES[place]):
        return PLACES[place](fuse), Boom, lambda: None
    burning = Fuse(fuse, KeyboardInterrupt)
    attention = model.model.layers[PLACES[place]].mlp  # past the attention: the block's keys are stored already
    handle = attention.register_forward_pre_hook(lambda *_: burning.burn())
    return {}, KeyboardInterrupt, handle.remove


@pytest.mark.parametrize("fuse", [0, 5])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_exact_after_an_error(model, one, three, marks, mode, place, fuse):
    wanted, wanted3 = greedy(model, one), greedy(model, three)
    offramp.attach(model, at=[2, 4])
    clean = marks(model)
    run = offramp.enable(model, "confidence", threshold=0.06, **MODES[mode])
    good, good3 = greedy(model, one), greedy(model, three)
    enabled = marks(model)
    for batch in (one, three):
        cache = DynamicCache(config=model.config)
        arguments, error, repair = break_at(model, place, fuse)
        try:
            greedy(model, batch, past_key_values=cache, **arguments)
            raised = False
        except error:
            raised = True
        repair()
        assert raised or place == "deep block"  # which may not be called that often
        assert marks(model) == enabled
        if raised:  # the user's cache takes the same call again
            text = greedy(model, batch, past_key_values=cache)
            assert torch.equal(text, good if batch is one else good3)
        assert torch.equal(greedy(model, one), good) and torch.equal(greedy(model, three), good3)
    run.disable()
    assert marks(model) == clean and not torch.is_inference_mode_enabled()
    assert torch.equal(greedy(model, one), wanted) and torch.equal(greedy(model, three), wanted3)


def test_a_cache_that_was_begun_survives_an_error(model, one):
    """After an error the user's cache is what it was before the call."""
    whole = greedy(model, one, new=2 * NEW)
    first = greedy(model, one, return_dict_in_generate=True)
    cache, length = first.past_key_values, first.past_key_values.get_seq_length()
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3):
        again = {"input_ids": first.sequences, "past_key_values": cache}
        with pytest.raises(Boom):
            greedy(model, again, logits_processor=LogitsProcessorList([Processor(7)]))
        assert {layer.get_seq_length() for layer in cache.layers} == {length}
        assert torch.equal(greedy(model, again), whole)


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_after_undo(model, one, three, marks, mode):
    def outputs():
        with torch.no_grad():
            return [model(**one).logits, model(**three).logits, greedy(model, one), greedy(model, three)]

    before, keys, clean = outputs(), list(model.state_dict()), marks(model)
    grads = [p.requires_grad for p in model.parameters()]
    exits = offramp.attach(model, at=[2, 4])
    run = offramp.enable(model, "confidence", threshold=0.06, **MODES[mode])
    outputs()
    run.disable()
    assert all(torch.equal(a, b) for a, b in zip(outputs(), before, strict=True))
    offramp.enable(model, "confidence", threshold=0.06, **MODES[mode])
    outputs()
    exits.detach()
    assert all(torch.equal(a, b) for a, b in zip(outputs(), before, strict=True))
    assert list(model.state_dict()) == keys and marks(model) == clean
    assert [p.requires_grad for p in model.parameters()] == grads
    assert "generate" not in model.__dict__ and "forward" not in model.__dict__


def test_plain_calls_are_untouched_while_enabled(model, one):
    """A forward of the user's own, trained on, has the full model's logits and gradients."""
    wanted = model(**one).logits
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3):
        greedy(model, one)
        found = model(**one).logits
        assert torch.equal(found, wanted)
        found.sum().backward()
    assert model.model.layers[5].mlp.up_proj.weight.grad is not None


def test_enable_twice_and_disable_twice(model, one):
    wanted = greedy(model, one)
    offramp.attach(model, at=[2])
    run = offramp.enable(model, "fixed", depth=2)
    with pytest.raises(NotAttached, match=r"already enabled on this model; first: run.disable\(\)"):
        offramp.enable(model, "never")
    assert run.enabled and not torch.equal(greedy(model, one), wanted)
    run.disable()
    run.disable()
    assert not run.enabled and torch.equal(greedy(model, one), wanted)
    other = offramp.enable(model, "fixed", depth=2)
    run.disable()  # an old run does not switch off a new one
    assert other.enabled and not torch.equal(greedy(model, one), wanted)
    other.disable()


def test_a_generate_of_the_users_own_is_put_back(model, one):
    """What stood on the instance before enable stands there again, and is what runs underneath."""
    calls, plain = [], model.generate

    def mine(*args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    model.generate = mine
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3):
        assert torch.equal(greedy(model, one), plain(**one, max_new_tokens=NEW, do_sample=False))
        assert len(calls) == 1
    assert model.generate is mine


def test_nothing_is_kept_alive(model, one):
    """Caches and rows of a call are gone after it."""
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3):
        for _ in range(8):  # the first calls make recordings of blocks, which stay
            greedy(model, one)
        gc.collect()
        before = sum(torch.is_tensor(o) for o in gc.get_objects())
        for _ in range(3):
            greedy(model, one)
        gc.collect()
        assert sum(torch.is_tensor(o) for o in gc.get_objects()) == before


def test_under_the_users_own_inference_mode(model, one, three):
    more = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    wanted = [greedy(model, one), greedy(model, three), greedy(model, three, **more)]
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3), torch.inference_mode():
        assert torch.equal(greedy(model, one), wanted[0]) and torch.equal(greedy(model, three), wanted[1])
        assert torch.equal(greedy(model, three, **more), wanted[2])
    assert torch.equal(greedy(model, one), wanted[0])
