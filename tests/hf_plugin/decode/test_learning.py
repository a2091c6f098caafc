"""What a policy is told in a decode: each token that left early and was seen by the deep blocks, once, and rightly."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import offramp
from offramp import _registry
from offramp.policy import ExitPolicy

NEW = 24


@dataclass(frozen=True)
class Listener(ExitPolicy):
    """Stops above a threshold and keeps, in its state, how many answers it was told of and how many were right."""

    needs: ClassVar[frozenset] = frozenset({"top1", "label"})
    threshold: float = 0.07
    heard: ClassVar[list] = []

    def start(self, batch, device):
        return {"told": torch.zeros(batch, 2)}

    def step(self, state, seen):
        assert state["told"].shape == (len(seen["top1"]), 2)
        return seen["top1"] >= self.threshold, state

    def learn(self, state, feedback):
        self.heard.append(feedback)
        count = torch.tensor([len(feedback.correct), feedback.correct.sum()])
        return {"told": state["told"] + count}


@pytest.fixture(autouse=True)
def listener(monkeypatch):
    monkeypatch.setitem(_registry._classes, (ExitPolicy, "listener"), Listener)
    Listener.heard.clear()


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


def truth(model, ids, prompt, depths, exits):
    """Per exit, what should be heard: (top1 at the exit, does the full model agree), token by token."""
    wanted = {i: [] for i in range(len(exits.at))}
    last = max((t for t, d in enumerate(depths) if d == 6), default=-1)
    with torch.no_grad():
        states = exits.backbone.observe({"input_ids": ids[:, :-1]}, exits.at)
        best = model(input_ids=ids[:, :-1]).logits[0].argmax(-1)
        for t, depth in enumerate(depths[:last]):
            if depth < 6:
                level = exits.at.index(depth)
                logits = exits[depth](states.hidden[level][prompt + t - 1])
                wanted[level].append((float(logits.softmax(-1).max()), bool(logits.argmax() == best[prompt + t - 1])))
    return wanted


@pytest.mark.parametrize("at", [[2], [2, 4]])
def test_it_hears_of_each_early_token_that_the_deep_blocks_saw(model, one, at):
    exits = offramp.attach(model, at=at)
    with offramp.enable(model, Listener()) as run:
        ids = greedy(model, one)
        depths, state = run.stats.last_depths.tolist(), run.memory["learned"][1]
    wanted = truth(model, ids, 9, depths, exits)
    heard = {f.index: list(zip(f.stats["top1"].tolist(), f.correct.tolist(), strict=True)) for f in Listener.heard}
    assert {i for i, pairs in wanted.items() if pairs} == set(heard)
    for level, pairs in heard.items():
        assert [c for _, c in pairs] == [c for _, c in wanted[level]]
        assert [s for s, _ in pairs] == pytest.approx([s for s, _ in wanted[level]], abs=1e-4)
    total = sum(wanted.values(), [])
    assert len(total) > 3 and state["told"].tolist() == [[len(total), sum(c for _, c in total)]]


def test_rows_of_a_batch_are_heard_as_alone(model, three):
    offramp.attach(model, at=[2])
    with offramp.enable(model, Listener()) as run:
        greedy(model, three)
        depths, together = run.stats.last_depths.view(3, NEW), sorted(Listener.heard[0].stats["top1"].tolist())
    last = int((depths == 6).any(0).nonzero().max())
    assert len(together) == int((depths[:, : last + 1] < 6).sum())


def test_what_was_learnt_stays_between_calls_and_goes_with_the_policy(model, one):
    offramp.attach(model, at=[2])
    with offramp.enable(model, Listener()) as run:
        greedy(model, one)
        once = run.memory["learned"][1]["told"].clone()
        greedy(model, one)
        assert torch.equal(run.memory["learned"][1]["told"], 2 * once)
        model.generation_config.early_exit = {"policy": "listener", "threshold": 0.06}
        greedy(model, one, generation_config=model.generation_config)
        assert run.memory["learned"][0].threshold == 0.06
        assert run.memory["learned"][1]["told"][0, 0] == len(Listener.heard[-1].correct)


def test_nobody_gathers_for_a_policy_that_does_not_learn(model, one, monkeypatch):
    monkeypatch.setattr("offramp_hf.decode.early.Learning", None)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.07) as run:
        greedy(model, one)
        assert "learned" not in run.memory


@pytest.mark.parametrize("options", [{"kv": "propagate"}, {"verify": True, "draft": 3}])
def test_where_no_token_waits_nothing_is_heard(model, one, options):
    offramp.attach(model, at=[2])
    with offramp.enable(model, Listener(), **options):
        greedy(model, one)
    assert not Listener.heard


def test_the_threshold_of_beta_mixture_moves(model, one):
    offramp.attach(model, at=[2])
    with offramp.enable(model, "beta_mixture", threshold=0.07, on="top1") as run:
        greedy(model, one)
        first = run.stats.last_depths.tolist()
        moved = float(run.memory["learned"][1]["threshold"])
        greedy(model, one)
        second = run.stats.last_depths.tolist()
    assert min(first) == 2 and moved >= 0.3 and second == [6] * NEW  # its scores are about 0.08


def test_a_gate_decides_in_a_decode(model, one):
    exits = offramp.attach(model, at=[2, 4], gate="linear")
    torch.nn.init.normal_(exits.gate_module.weight)
    looked = []
    exits[2].register_forward_hook(lambda m, args, out: looked.append(1))
    with offramp.enable(model, "gate", threshold=[0.7, 0.3]) as run:
        ids = greedy(model, one)
        depths = run.stats.last_depths.tolist()
    with torch.no_grad():
        states = exits.backbone.observe({"input_ids": ids[:, :-1]}, exits.at).hidden
        said = [[float(exits.gate_module(h[8 + t])) for h in states] for t in range(NEW)]
    for t in range(1, NEW):
        assert depths[t] == (2 if said[t][0] >= 0.7 else 4 if said[t][1] >= 0.3 else 6)
    assert len(looked) == depths.count(2) and len(set(depths)) == 3  # no head runs for a token that goes on
