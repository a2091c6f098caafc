"""Evidence of drafts is made without logits where nobody reads them, and is the same evidence."""

import pytest
import torch
import transformers as hf

import offramp
from offramp.heads.tied import Tied
from offramp_hf.decode import answers


@pytest.fixture
def calls(monkeypatch):
    """How often a head makes logits."""
    made, forward = [], Tied.forward

    def count(self, hidden):
        made.append(hidden.shape)
        return forward(self, hidden)

    monkeypatch.setattr(Tied, "forward", count)
    return made


def text(model, batch, **kwargs):
    return model.generate(**batch, max_new_tokens=24, **{"do_sample": False, **kwargs})


POLICIES = [{"policy": "confidence", "threshold": 0.06}, {"policy": "entropy", "threshold": 4.0}]


@pytest.mark.parametrize("policy", POLICIES, ids=["confidence", "entropy"])
@pytest.mark.parametrize("some", [None, range(10, 90)], ids=["all", "some"])
@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_no_logits_and_the_same_drafts(model, three, calls, monkeypatch, policy, some, kernels):
    monkeypatch.setenv("OFFRAMP_KERNELS", kernels)
    wanted = text(model, three)
    offramp.attach(model, [2, 4])
    told = []
    for least in (16384, 50):
        monkeypatch.setattr(answers, "MANY", least)
        calls.clear()
        with offramp.enable(model, policy, verify=True, draft=3, draft_vocabulary=some) as run:
            assert torch.equal(text(model, three), wanted)
        assert run.stats.drafted and bool(calls) == (least > 97)
        told.append((run.stats.drafted, run.stats.accepted))
    assert told[0] == told[1]


@pytest.mark.parametrize("why", ["sampling", "processor", "tree", "policy", "hook"])
def test_logits_where_somebody_reads_them(model, one, calls, monkeypatch, why):
    monkeypatch.setattr(answers, "MANY", 50)
    offramp.attach(model, [2, 4])
    policy = {"policy": "confidence", "threshold": 0.0}
    policy = {"policy": "tempered", "inner": policy, "temperature": 1.5} if why == "policy" else policy
    if why == "hook":  # what a hook does to the unembedding, statistics from its weights would miss
        model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    wanted = text(model, one)
    more = {"sampling": {"do_sample": True}, "processor": {"repetition_penalty": 1.2}}.get(why, {})
    with offramp.enable(model, policy, verify=True, draft="tree" if why == "tree" else 3) as run:
        found = text(model, one, **more)
    assert calls and run.stats.drafted
    assert more or torch.equal(found, wanted)


def test_a_soft_cap_is_in_the_statistics(one, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = hf.Gemma2Config(vocab_size=97, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5, **sizes)
    model = hf.Gemma2ForCausalLM(config).eval()
    offramp.attach(model, [2])
    told = []
    for least in (16384, 50):
        monkeypatch.setattr(answers, "MANY", least)
        with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3) as run:
            kept, look = [], answers.Answers.look

            def keep(self, *args, look=look, kept=kept):
                found = look(self, *args)
                kept.append(found[1]["top1"])
                return found

            monkeypatch.setattr(answers.Answers, "look", keep)
            text(model, one)
            monkeypatch.setattr(answers.Answers, "look", look)
        told.append((torch.cat(kept), run.stats.drafted))
    assert told[0][1] == told[1][1] > 0
    torch.testing.assert_close(told[0][0], told[1][0])
