"""Prompt lookup: the latest earlier place, longest match first, lengths by what was right."""

import torch

import offramp
from offramp._registry import create
from offramp.draft import DraftRule, Outcome, Setup


def start(**options):
    drafter = create(DraftRule, "lookup", **options).start(Setup((2,), 8, (0,)))
    drafter.begin(1)
    return drafter


def by_hand(text, ngram, least):
    """Where the longest suffix of at most `ngram` tokens stood last before."""
    for n in range(min(ngram, len(text)), least - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[len(text) - n :]:
                return end
    return None


def test_the_latest_place_of_the_longest_match():
    make = torch.Generator().manual_seed(0)
    text = torch.randint(4, (200,), generator=make).tolist()
    drafter, found = start(ngram=3, least=2, length=5), 0
    for stop in range(3, 200):
        drafts = drafter.propose([text[:stop]], 5)[0]
        place = by_hand(text[:stop], 3, 2)
        assert bool(drafts) == (place is not None)
        if drafts:
            found += 1
            assert drafts[0] == text[place]
            whole = text[:stop] + drafts
            assert drafts == whole[place : place + len(drafts)]
    assert found > 100


def test_a_repeating_text_goes_on_past_its_end():
    drafter = start(length=7)
    assert drafter.propose([[5, 6, 7, 5, 6, 7, 5]], 7)[0] == [6, 7, 5, 6, 7, 5, 6]


def test_room_and_ended_rows():
    drafter = create(DraftRule, "lookup").start(Setup((2,), 8, (0,)))
    drafter.begin(2)
    assert drafter.propose([[1, 2, 1, 2, 1], []], 2) == [[2, 1], []]


def test_length_follows_what_was_right():
    good, bad = start(length=10), start(length=10)
    good.setup.wider = bad.setup.wider = 0.05
    text = [1, 2, 3] * 5
    for _ in range(30):
        for drafter, right in ((good, True), (bad, False)):
            drafts = drafter.propose([text], 10)[0]
            accepted = len(drafts) if right else 0
            drafter.learn(Outcome(0, [0] * (accepted + 1), len(drafts), accepted + 1, given=True))
    assert len(good.propose([text], 10)[0]) == 10 and len(bad.propose([text], 10)[0]) < 2
    later = [len(bad.propose([text], 10)[0]) for _ in range(200)]
    assert max(later) > 0  # it is tried again some day


def test_drafts_come_in_few_sizes():
    """Calls of a size are quick once one was recorded, so 12 sizes would be slow for 12 times as long."""
    drafter, text, seen = start(length=12), [1, 2, 3] * 5, set()
    drafter.setup.wider = 0.1
    for step in range(200):
        drafts = drafter.propose([text], 40)[0]
        seen.add(len(drafts))
        accepted = len(drafts) if step // 20 % 2 else min(len(drafts), 1)
        drafter.learn(Outcome(0, [0] * (accepted + 1), len(drafts), accepted + 1, given=True))
    assert {2, 4, 12} <= seen <= {0, 1, 2, 4, 8, 12}


def test_what_checking_costs_outside_blocks_counts():
    """A match that is right half of the time promises 1.5 tokens and more, of a call that costs twice as much nothing.
    """
    drafter, text = start(), [1, 2, 3, 1, 2, 3, 1]
    assert drafter.propose([text], 8)[0]
    drafter.setup.given = 8.0
    assert drafter.propose([text], 8) == [[]]


def test_rows_share_one_call():
    """One row that finds something among many that do not makes a wide call for nothing."""
    alone = create(DraftRule, "lookup").start(Setup((2,), 8, (0,), wider=0.2))
    alone.begin(1)
    assert len(alone.propose([[1, 2, 3, 1, 2, 3, 1]], 8)[0]) > 0
    many = create(DraftRule, "lookup").start(Setup((2,), 8, (0,), wider=0.2))
    many.begin(8)
    assert many.propose([[1, 2, 3, 1, 2, 3, 1], *([10 + r, 11, 12, 13] for r in range(7))], 8) == [[]] * 8


def test_no_exit_is_asked(monkeypatch):
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=11, eos_token_id=None, pad_token_id=0, **sizes)).eval()
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False)
    exits = offramp.attach(model, at=[2])
    monkeypatch.setattr(type(exits[2]), "forward", lambda self, hidden: 1 / 0)
    with offramp.enable(model, "fixed", depth=2, verify=True, draft="lookup") as run:
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), wanted)
        assert run.stats.accepted and run.stats.rounds < 40 and set(run.stats.exits) == {0, 4}
