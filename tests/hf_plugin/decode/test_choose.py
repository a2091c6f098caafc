"""Sampling with drafts has the full model's own distribution; rules of acceptance one by one."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList

import offramp
from offramp_hf.decode import clock
from offramp_hf.decode.choose import Chooser, draw

DRAWS, VOCAB = 4000, 8


def pairs(model, prompt, **kwargs):
    """Count the texts of three tokens: [vocab ** 3]; the last two come from drafts, where drafts are made."""
    out = model.generate(
        prompt, do_sample=True, max_new_tokens=3, min_new_tokens=3, num_return_sequences=DRAWS, **kwargs
    )[:, -3:]
    return torch.bincount((out * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1), minlength=VOCAB**3).double()


def exact(model, prompt, temperature=1.0, top_k=0):
    """The probability of every text of three tokens, from the full model."""

    def after(ids):
        scores = model(input_ids=ids).logits[:, -1].double() / temperature
        if top_k:
            scores[scores < scores.topk(top_k).values[:, -1:]] = -torch.inf
        return scores.softmax(-1)

    with torch.no_grad():
        p, ids = torch.ones(1, dtype=torch.double), prompt
        for _ in range(3):
            p = (p[:, None] * after(ids)).flatten()
            tail = torch.arange(VOCAB).repeat(len(ids))[:, None]
            ids = torch.cat([ids.repeat_interleave(VOCAB, 0), tail], 1)
    return p


def p_value(counts, p):
    if counts[p == 0].sum():
        return 0.0  # a text that the full model cannot say
    common = p * DRAWS >= 5
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([p[common], p[~common].sum()[None]]) * DRAWS
    keep = wanted > 0
    return chisquare(found[keep].numpy(), (wanted[keep] * found.sum() / wanted[keep].sum()).numpy()).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 4}], ids=["plain", "warped"])
def test_same_distribution(make, options):
    model = make(vocab=VOCAB, scale=0.5, hidden_size=16, intermediate_size=32)
    model.generation_config.top_k = options.pop("top_k", 0)
    prompt, given = torch.tensor([[3, 4, 5]]), {"top_k": model.generation_config.top_k, **options}
    p = exact(model, prompt, **given)
    offramp.attach(model, at=[2])
    torch.manual_seed(3)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=2) as run:
        assert p_value(pairs(model, prompt, **options), p) > 1e-3
        assert 0.2 < run.stats.accepted / run.stats.drafted < 0.99
    # the test can fail: what the exit alone would say is another distribution
    with offramp.enable(model, "fixed", depth=2):
        assert p_value(pairs(model, prompt, **options), p) < 1e-6


WORDS, TEXTS = 32, 20000
WAYS = [
    {"draft": {"rule": "fixed", "length": 2}},
    {"draft": {"rule": "fixed", "length": 2}, "draft_vocabulary": range(4, 24)},
    {"draft": {"rule": "tree", "width": 3, "length": 2}},
    *({"draft": rule} for rule in ("lookup", "hybrid", "dssd")),
]


@pytest.mark.slow
def test_every_kind_of_draft_keeps_the_distribution(make, monkeypatch):
    """20,000 texts over 32 words and six kinds of drafts, at 5 % for all of them together."""
    # at their prices no rule would draft for so many rows
    for price, value in (("FRAYED", 1.0), ("RAGGED", 0.0), ("WIDER", 0.0)):
        monkeypatch.setattr(clock, price, value)
    model = make(vocab=WORDS, scale=0.5, hidden_size=16, intermediate_size=32)
    model.generation_config.top_k = 0
    # every word can be looked up
    prompt = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))[None]
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "max_new_tokens": 3, "min_new_tokens": 3}
    with torch.no_grad():  # the second word's distribution; the first comes from the prompt's full pass
        first = model(input_ids=prompt).logits[0, -1].double().softmax(-1)
        longer = torch.cat([prompt.expand(WORDS, -1), torch.arange(WORDS)[:, None]], 1)
        p = (first[:, None] * model(input_ids=longer).logits[:, -1].double().softmax(-1)).flatten()
    offramp.attach(model, at=[2])
    torch.manual_seed(4)
    for way in WAYS:
        with offramp.enable(model, "fixed", depth=2, verify=True, **way) as run:
            out = model.generate(prompt, num_return_sequences=TEXTS, **given)[:, -3:-1]
            assert 0 < run.stats.accepted < run.stats.drafted, way
        counts = torch.bincount((out * torch.tensor([WORDS, 1])).sum(-1), minlength=WORDS**2).double()
        common = p * TEXTS >= 5
        found = torch.cat([counts[common], counts[~common].sum()[None]])
        wanted = torch.cat([p[common], p[~common].sum()[None]]) * TEXTS
        assert chisquare(found.numpy(), (wanted * found.sum() / wanted.sum()).numpy()).pvalue > 0.05 / len(WAYS), way


def chooser(sample):
    return Chooser(LogitsProcessorList(), sample)


def test_greedy_acceptance():
    logits = torch.eye(4)[[1, 2, 3]] * 5  # the full model says 1, 2, 3
    prefix, guesses = torch.tensor([[0]]), [torch.zeros(1, 4)] * 2
    assert chooser(False).judge(prefix, [1, 2], logits, guesses)[0] == [1, 2, 3]
    assert chooser(False).judge(prefix, [1, 0], logits, guesses)[0] == [1, 2]
    assert chooser(False).judge(prefix, [3, 2], logits, guesses)[0] == [1]
    assert chooser(False).judge(prefix, [], logits[:1], [])[0] == [1]


def test_sampled_acceptance_is_the_quotient():
    """P(draft kept) = min(1, p/q), and a rejected draft is replaced from max(0, p - q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.25, 0.1, 0.4, 0.25])
    logits, guess, n = p.log()[None].repeat(2, 1), q.log()[None], 4000
    for draft in range(4):
        first = [chooser(True).judge(torch.tensor([[0]]), [draft], logits, [guess])[0][0] for _ in range(n // 4)]
        counts = torch.bincount(torch.tensor(first), minlength=4).double() / len(first)
        kept = min(1.0, float(p[draft] / q[draft]))
        rest = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum() * (1 - kept)
        rest[draft] += kept
        torch.testing.assert_close(counts.float(), rest, rtol=0, atol=0.06)


def test_a_certain_draft_is_kept_as_often_as_the_full_model_says_it():
    p, n = torch.tensor([0.5, 0.3, 0.2, 0.0]), 2000
    logits = p.log()[None].repeat(3, 1)
    for draft in range(4):
        found = [chooser(True).judge(torch.tensor([[0]]), [draft, 0], logits, None)[0] for _ in range(n)]
        assert all((len(tokens) > 1) == (tokens[0] == draft) for tokens in found)
        counts = torch.bincount(torch.tensor([tokens[0] for tokens in found]), minlength=4) / n
        torch.testing.assert_close(counts, p, rtol=0, atol=0.06)


def test_equal_distributions_always_keep():
    same = torch.randn(1, 50)
    for _ in range(50):
        draft = int(chooser(True).pick(same))
        tokens, _ = chooser(True).judge(torch.tensor([[0]]), [draft], same.repeat(2, 1), [same])
        assert tokens[0] == draft and len(tokens) == 2


def test_a_draft_from_nan_is_replaced(make):
    """A broken head neither raises nor biases: each of its drafts is replaced by a draw from the full model."""
    model = make(vocab=VOCAB)
    exits = offramp.attach(model, at=[2])
    exits[2].exit_norm.weight.data.fill_(float("nan"))
    for policy in ({"policy": "fixed", "depth": 2}, {"policy": "confidence", "threshold": 0.0}):
        with offramp.enable(model, offramp.policy(policy.pop("policy"), **policy), verify=True, draft=2) as run:
            out = model.generate(torch.tensor([[3, 4, 5]]), do_sample=True, max_new_tokens=8, min_new_tokens=8)
            assert out.shape == (1, 11) and run.stats.accepted == 0


def test_one_row_in_one_row_out():
    """A processor that answers for a whole batch cannot be asked row by row, and says so."""
    from offramp.errors import BadArgument

    mixed = Chooser(LogitsProcessorList([lambda ids, scores: scores + torch.zeros(3, 4)]), False)
    with pytest.raises(BadArgument, match="logits processor"):
        mixed.judge(torch.tensor([[0]]), [], torch.zeros(1, 4), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_are_drawn_as_often_as_their_weights_say(dtype):
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 0.0], [5.0, 0.0, 0.0, 1.0, 0.0, 2.0]], dtype=dtype)
    found = draw(weights.repeat_interleave(20_000, 0)).view(2, -1)
    for row, wanted in zip(found, weights, strict=True):
        counts, possible = torch.bincount(row, minlength=6), wanted > 0
        assert not counts[~possible].any()
        shares = wanted[possible].double() / wanted.double().sum() * len(row)
        assert chisquare(counts[possible].numpy(), shares.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_nothing_is_drawn_from_what_is_no_distribution(broken):
    with pytest.raises(RuntimeError, match="probabilities are no numbers, or all of them are 0"):
        draw(torch.full((1, 4), broken))


def test_a_list_of_processors_with_a_call_of_its_own_is_called_as_a_whole():
    class Doubling(LogitsProcessorList):
        def __call__(self, ids, scores, **kwargs):
            return 2 * super().__call__(ids, scores)

    def more(ids, scores):
        return scores + 1

    ids, logits = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4)
    assert Chooser(LogitsProcessorList([more, more]), True).scores(ids, logits).tolist() == [[3.0] * 4]
    assert Chooser(Doubling([more, more]), True).scores(ids, logits).tolist() == [[6.0] * 4]


def test_a_processor_that_asks_for_more_is_refused_as_the_framework_does():
    class Greedy:
        def __call__(self, ids, scores, more):
            return scores

    ids, logits = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4)
    with pytest.raises(ValueError, match="required parameters"):
        Chooser(LogitsProcessorList([Greedy()]), True).scores(ids, logits)
