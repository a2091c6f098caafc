"""DEL: exit and length equal brute force over recorded tables; counts, thresholds and shadows."""

import math
from itertools import product

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.draft import DraftRule, Look, Outcome, Setup, Shadow


def start(depths=(2, 4, 6), depth=8, levels=None, head=0.0, **options):
    levels = tuple(range(len(depths))) if levels is None else levels
    return create(DraftRule, "del", **options).start(Setup(depths, depth, levels, head))


def recorded(seed, rounds=12):
    """Random tables of what three exits and the full model said."""
    make = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        count = int(torch.randint(1, 6, (1,), generator=make))
        full = torch.randint(3, (count,), generator=make).tolist()
        shadows = []
        for level in range(3):
            wrong = torch.rand(count, generator=make) > 0.4 + 0.2 * level
            tokens = [t + 1 if w else t for t, w in zip(full, wrong.tolist(), strict=True)]
            shadows.append(Shadow(level, tokens, torch.rand(count, generator=make).tolist()))
        yield Outcome(0, full, count - 1, count, (), shadows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("head", [0.0, 1.5])
def test_choice_equals_brute_force(seed, head):
    drafter, seen = start(head=head), list(recorded(seed))
    for one in seen:
        drafter.learn(one)
    value = {}
    for level, drafts in product(range(3), range(18)):
        right = wrong = 0.0
        for age, one in enumerate(reversed(seen)):
            hits = sum(a == b for a, b in zip(one.shadows[level].tokens, one.tokens, strict=True))
            right += 0.95**age * hits
            wrong += 0.95**age * (len(one.tokens) - hits)
        rate = right / (right + wrong)
        tokens = sum(rate**i for i in range(drafts + 1))
        value[level, drafts] = tokens / (8 + drafts * ((2, 4, 6)[level] + head))
    best = max(value.values())
    assert value[drafter.choose()] == pytest.approx(best, rel=1e-12)


def test_stop_threshold_is_the_middle_and_nan_stops_nothing():
    drafter = start()
    look = Look(0, 0, [0.3], [1], [True])
    assert math.isnan(drafter.threshold(0)) and drafter.goes_on(look, [0])
    drafter.learn(Outcome(0, [1, 2], 1, 2, (), [Shadow(0, [1, 9], [0.9, 0.2])]))
    assert drafter.threshold(0) == pytest.approx((0.9 + 0.2) / 2)
    assert not drafter.goes_on(look, [0]) and drafter.goes_on(Look(0, 0, [0.6], [1], [True]), [0])


def test_first_round_drafts_once_and_closed_exits_are_left_alone():
    drafter = start(levels=(1, 2))
    plan = drafter.plan(9)
    assert (plan.levels, plan.length, plan.shadow) == ((1,), 1, True)
    for one in recorded(3):
        drafter.learn(one)
    assert drafter.plan(9).levels in ((1,), (2,), ())


def test_shadows_are_what_the_exits_say(monkeypatch):
    """Driven for real: every shadow token is the exit's own answer for that text, in a batch too."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, eos_token_id=None, pad_token_id=0, **sizes)).eval()
    exits = offramp.attach(model, at=[1, 2], head="translator")
    kept = []
    with offramp.enable(model, "fixed", depth=1, verify=True, draft={"rule": "del", "every": 1}) as run:
        model.generate(torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False)  # makes the drafter
        drafter = run.memory[run.rule][0]
        learn = drafter.learn
        monkeypatch.setattr(drafter, "learn", lambda outcome: (kept.append(outcome), learn(outcome)))
        out = model.generate(torch.arange(3, 9)[None], max_new_tokens=12, do_sample=False)
    with torch.no_grad(), exits.backbone.chain().capture([1, 2]) as states:
        model(input_ids=out)
    at = 6  # the first generated token came from the prefill
    assert sum(bool(outcome.shadows) for outcome in kept) >= len(kept) - 1  # no room is left in the last round
    for outcome in kept:
        for shadow in outcome.shadows:
            said = exits[(1, 2)[shadow.level]](states[(1, 2)[shadow.level]][0, at : at + len(shadow.tokens)])
            # places past the accepted drafts were run on drafts that are not in the text
            assert shadow.tokens[: outcome.kept] == said.argmax(-1).tolist()[: outcome.kept]
        at += outcome.kept


def test_looks_at_all_exits_stay_cheap():
    paper, dear, free = start(every=1), start(head=0.8), start()
    for drafter, shadows in ((paper, 40), (dear, 8), (free, 40)):  # 3 heads of 0.8 are 30 % of 8 blocks
        drafter.learn(next(iter(recorded(1))))
        assert sum(drafter.plan(5).shadow for _ in range(40)) == shadows
