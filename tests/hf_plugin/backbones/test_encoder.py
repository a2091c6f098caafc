"""Encoder classifiers of six families, from tiny configs: what comes out, what ran, and what is left behind."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as hf
from torch import nn

import offramp
from offramp._plugins import adapt
from offramp.attach import find
from offramp.errors import BadArgument, UnsupportedModel
from offramp.policy import Evidence, ExitPolicy, State
from offramp_hf.classify import encoder_folder
from offramp_hf.sections import find_sample, largest, read

DEPTH, CLASSES, VOCAB = 5, 4, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_labels": CLASSES,
    "initializer_range": 0.3,  # wide enough that rows differ after every block
}
DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 64, "num_labels": CLASSES}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
MODERN = {f"{name}_token_id": 1 for name in ("cls", "sep", "bos", "eos")} | {"pad_token_id": 0, "local_attention": 4}


def mean_pooled():
    return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**SIZES, **MODERN, classifier_pooling="mean"))


FAMILIES = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**SIZES, embedding_size=16)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL, initializer_range=0.3)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**SIZES, **MODERN)),
    "modernbert-mean": mean_pooled,
    "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SIZES, **DEBERTA)),
}
ATTENTION = {"bert": "BertAttention", "albert": "AlbertAttention", "roberta": "RobertaAttention"}
ATTENTION |= {"distilbert": "DistilBertSelfAttention", "modernbert": "ModernBertAttention"}
ATTENTION |= {"modernbert-mean": "ModernBertAttention", "deberta-v2": "DebertaV2Attention"}


@dataclass(frozen=True)
class Planned(ExitPolicy):
    """Stops row i at the first exit at or after depth plan[i]; 99 is never."""

    needs: ClassVar[frozenset[str]] = frozenset()
    plan: tuple[int, ...]

    def start(self, batch: int, device: torch.device | str) -> State:
        return {"plan": torch.tensor(self.plan[:batch], device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[torch.Tensor, State]:
        return state["plan"] <= seen.depth, state


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return FAMILIES[family]().eval()


def rows(n=6, tokens=9, seed=1):
    """Ids of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (n, tokens), generator=generator)
    mask = torch.arange(tokens)[None] < tokens - torch.arange(n)[:, None] % (tokens - 2)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def take(batch, index):
    return {k: v[index] for k, v in batch.items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def lens(model, batch, depth):
    """The logit lens by hand: the model's own code after its last block, on the state after `depth` blocks."""
    backbone = adapt(model)
    with backbone.chain().capture([depth]) as states, torch.no_grad():
        model(**batch)
    last = backbone.depth - 1
    undo = backbone.chain().install(lambda i, call: call.skip(states[depth] if i == last else None))
    try:
        return logits(model, batch)
    finally:
        undo()


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_untrained_exit_is_the_logit_lens(model, head):
    batch = rows()
    wanted = {d: lens(model, batch, d) for d in (1, DEPTH - 1)}
    offramp.attach(model, at=[1, DEPTH - 1], head=head)
    for depth, want in wanted.items():
        with offramp.enable(model, "fixed", depth=depth) as run:
            close(logits(model, batch), want)
            assert run.stats.last_depths.tolist() == [depth] * 6


def test_rows_get_the_answer_of_their_exit(model):
    batch, plan = rows(), (1, 99, 3, 1, 99, 3)
    full = logits(model, batch)
    wanted = torch.stack([(full if p == 99 else lens(model, batch, p))[i] for i, p in enumerate(plan)])
    offramp.attach(model, at=[1, 3])
    with offramp.enable(model, Planned(plan)) as run:
        close(logits(model, batch), wanted)
        assert run.stats.last_depths.tolist() == [DEPTH if p == 99 else p for p in plan]
        assert run.stats.exits == {1: 2, 3: 2, DEPTH: 2}
        assert (run.stats.blocks_run, run.stats.blocks_full) == (2 + 6 + 2 * DEPTH, 6 * DEPTH)
        assert run.stats.saved == pytest.approx(1 - 18 / 30)


def test_blocks_really_run(model, family):
    """The rows that attention sees are what the stats claim: each block once per row, none for rows that left."""
    seen = []
    for module in model.modules():
        if type(module).__name__ == ATTENTION[family]:
            module.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
            )
    offramp.attach(model, at=[1, 3])
    seen.clear()
    with offramp.enable(model, Planned((1, 99, 3, 1, 99, 3))) as run:
        logits(model, rows())
        assert seen == [6, 4, 4, 2, 2]
        assert run.stats.blocks_run == sum(seen)
    seen.clear()
    with offramp.enable(model, "fixed", depth=3):
        logits(model, rows())
    assert seen == [6, 6, 6]


def test_a_batch_decides_as_its_rows_alone(model):
    batch = rows(8)
    offramp.attach(model, at=[1, 2, 4])
    with torch.no_grad():
        scores = [model.exits[str(d)](h).softmax(-1).amax(-1) for d, h in _states(model, batch, (1, 2, 4)).items()]
    threshold = torch.stack(scores).median().item() + 1e-4
    with offramp.enable(model, "confidence", threshold=threshold) as run:
        together, depths = logits(model, batch), run.stats.last_depths
        assert len(depths.unique()) > 1
        order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
        close(logits(model, take(batch, order)), together[order])
        assert torch.equal(run.stats.last_depths, depths[order])
        for i in range(8):
            close(logits(model, take(batch, slice(i, i + 1))), together[i : i + 1])
            assert run.stats.last_depths.tolist() == [depths[i]]


def _states(model, batch, depths):
    found = find(model).backbone.observe(batch, depths)
    return dict(zip(depths, found.hidden, strict=True))


def test_bit_equal_afterwards(model):
    batch = rows()
    before, keys = logits(model, batch), list(model.state_dict())
    flags = {n: (m.training, dict(m.__dict__)) for n, m in model.named_modules()}
    exits = offramp.attach(model, at=[2])
    run = offramp.enable(model, "fixed", depth=2)
    logits(model, batch)
    run.disable()
    assert torch.equal(logits(model, batch), before)
    offramp.enable(model, "fixed", depth=2)
    exits.detach()
    assert torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        mode, attributes = flags[name]
        assert module.training == mode and module.__dict__.keys() == attributes.keys()
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def test_exact_after_exceptions(model):
    """A head that throws in the middle of a forward leaves nothing behind, enabled or disabled."""
    batch = rows()
    before = logits(model, batch)
    exits = offramp.attach(model, at=[2, 4])
    with offramp.enable(model, Planned((2, 4, 99, 2, 4, 99))) as run:
        good = logits(model, batch)
        handle = exits[4].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            logits(model, batch)
        handle.remove()
        assert run.stats.rows == 6
        assert torch.equal(logits(model, batch), good)
    assert torch.equal(logits(model, batch), before)


def test_probe_changes_nothing():
    model = FAMILIES["bert"]().train()
    model.bert.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    offramp.attach(model, at=[1]).detach()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_labels_give_the_loss_of_the_early_logits(model):
    batch, labels = rows(), torch.tensor([0, 1, 2, 3, 0, 1])
    offramp.attach(model, at=[2])
    with offramp.enable(model, Planned((2, 99, 2, 99, 2, 99))), torch.no_grad():
        out = model(**batch, labels=labels)
    close(out.loss, nn.functional.cross_entropy(out.logits, labels))


def test_training_mode_has_gradients(model):
    batch, labels = rows(), torch.tensor([0, 1, 2, 3, 0, 1])
    offramp.attach(model, at=[2])
    model.train()
    with offramp.enable(model, Planned((2, 99, 2, 99, 2, 99))):
        model(**batch, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.exits["2"].parameters())
    assert all(p.grad is not None for p in model.get_input_embeddings().parameters())


def test_copies_are_independent(model):
    batch = rows()
    before = logits(model, batch)
    offramp.attach(model, at=[2])
    run = offramp.enable(model, Planned((2, 99, 2, 99, 2, 99)))
    early = logits(model, batch)
    twin = copy.deepcopy(model)
    run.disable()
    assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(twin, batch), early)
    mine = twin.__dict__["_offramp_run"]
    assert mine is not run and mine.stats.rows == 12 and run.stats.rows == 6
    mine.disable()
    assert torch.equal(logits(twin, batch), before)


def test_moves_with_the_model(model):
    offramp.attach(model, at=[2])
    run = offramp.enable(model, Planned((2, 99, 2, 99, 2, 99)))
    model.to(torch.float64)
    assert logits(model, rows()).dtype == torch.float64
    assert run.stats.exits == {2: 3, DEPTH: 3}


def test_half_precision_from_the_start(model):
    model.to(torch.bfloat16)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2):
        assert logits(model, rows()).dtype == torch.bfloat16


def test_nan_does_not_exit():
    """Rows with a broken state run to the end and are counted, whichever evidence the policy reads."""
    model = FAMILIES["bert"]().eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = float("nan")
    batch = rows()
    batch["input_ids"][3, 0] = 5
    offramp.attach(model, at=[1, 3])
    for options in ({"policy": "confidence", "threshold": 0.0}, {"policy": "fixed", "depth": 1}):
        with offramp.enable(model, **options) as run:
            found = logits(model, batch)
        assert run.stats.last_depths.tolist() == [DEPTH if i == 3 else 1 for i in range(6)]
        assert run.stats.nonfinite == 2  # at both exits
        assert found[[0, 1, 2, 4, 5]].isfinite().all() and found[3].isnan().all()


def test_empty_batch():
    model = FAMILIES["bert"]().eval()
    offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2) as run:
        logits(model, rows())
        found = logits(model, take(rows(), slice(0, 0)))
        assert found.shape == (0, CLASSES) and run.stats.rows == 6 and run.stats.last_depths.shape == (0,)


def test_positions_per_row(model):
    """Positions given per row reach some blocks as one more argument whose rows must leave too."""
    batch, plan = rows(), (2, 99, 2, 99, 2, 99)
    batch["position_ids"] = (torch.arange(9)[None] + torch.arange(6)[:, None]) % 9
    offramp.attach(model, at=[2])
    full = logits(model, batch)
    with offramp.enable(model, Planned(plan)):
        close(logits(model, batch)[1::2], full[1::2])


@pytest.mark.parametrize("how", ["positional", "tuple", "embeds", "no mask"])
def test_ways_to_call(model, how):
    batch = rows()
    if how == "no mask":
        batch = {"input_ids": torch.randint(3, VOCAB, (6, 9))}
    offramp.attach(model, at=[2])
    with offramp.enable(model, Planned((2, 99, 2, 99, 2, 99))) as run, torch.no_grad():
        want = model(**batch).logits
        if how == "positional":
            found = model(batch["input_ids"], batch["attention_mask"]).logits
        elif how == "tuple":
            found = model(**batch, return_dict=False)[0]
        elif how == "embeds":
            embeds = model.get_input_embeddings()(batch["input_ids"])
            found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        else:
            found = model(**batch, labels=torch.zeros(6, dtype=torch.long)).logits
        if how == "embeds" and "roberta" in type(model).__name__.lower():
            return  # RoBERTa counts positions from the ids: without them they differ, by its own rule
        close(found, want)
        assert run.stats.rows == 12


def test_states_of_all_blocks_need_all_blocks(model):
    batch = rows()
    full = logits(model, batch)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2) as run, torch.no_grad():
        with pytest.warns(UserWarning, match="output_hidden_states needs every block"):
            out = model(**batch, output_hidden_states=True)
        assert torch.equal(out.logits, full) and len(out.hidden_states) == DEPTH + 1
        assert all(h.shape[0] == 6 for h in out.hidden_states)
        model(**batch, output_hidden_states=True)  # warns once
        assert run.stats.rows == 0
    with offramp.enable(model, "fixed", depth=2, strict=True), torch.no_grad():
        with pytest.raises(BadArgument, match="without strict=True"):
            model(**batch, output_hidden_states=True)
        assert model(**batch).logits.shape == full.shape


def test_parts_of_the_model_stay_whole():
    model, batch = FAMILIES["bert"]().eval(), rows()
    with torch.no_grad():
        before = model.bert(**batch).last_hidden_state
        offramp.attach(model, at=[2])
        with offramp.enable(model, "fixed", depth=2):
            assert torch.equal(model.bert(**batch).last_hidden_state, before)


def test_regression():
    config = hf.BertConfig(**{**SIZES, "num_labels": 1})
    model, batch = hf.BertForSequenceClassification(config).eval(), rows()
    wanted = lens(model, batch, 2)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2), torch.no_grad():
        out = model(**batch, labels=torch.randn(6))
        close(out.logits, wanted)
    with pytest.raises(BadArgument, match="regression"):
        offramp.enable(model, "confidence", threshold=0.9)
    assert "_offramp_run" not in model.__dict__


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("patience", {"patience": 1, "tolerance": 0.05}),
        ("agreement", {"threshold": 0.05}),
        ("learned_to_exit", {}),
    ],
)
def test_a_regression_learns_exits_and_leaves_early(outputs, name, options):
    torch.manual_seed(0)
    config = hf.BertConfig(**{**SIZES, "num_labels": outputs, "problem_type": "regression"})
    model = hf.BertForSequenceClassification(config).eval()
    ids = torch.randint(1, SIZES["vocab_size"], (64, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.stack([ids[:, 0], ids[:, 1]], 1).float()[:, :outputs] / 20
    data = {**batch, "labels": labels[:, 0] if outputs == 1 else labels}
    depths = range(1, SIZES["num_hidden_layers"])
    offramp.attach(model, at=list(depths), head="linear", gate="learned_to_exit")
    report = offramp.fit(model, data, loss="labels", steps=60, lr=1e-2, progress=False)
    assert report.losses[-1] < 0.7 * report.losses[0]
    offramp.fit(model, data, loss="learned_to_exit", steps=60, lr=5e-2, progress=False)
    trace = offramp.record(model, data, logits=True)
    assert trace.targets is None and trace.losses is not None
    middle = trace.stats["learned_to_exit"][:, :-1].median().item()  # half of all certainties are above
    policy = offramp.policy(name, **options or {"threshold": middle})
    outcome = offramp.simulate(trace, policy)
    with offramp.enable(model, policy) as run, torch.no_grad():
        out = model(**batch).logits
    assert torch.equal(outcome.depths, run.stats.last_depths) and len(outcome.depths.unique()) > 1
    close(out, trace.logits[torch.arange(64), outcome.columns])


@pytest.mark.parametrize("options", [{"verify": True}, {"draft": 4}, {"kv": "propagate"}])
def test_options_of_generation_are_refused(options):
    model = FAMILIES["bert"]().eval()
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match=f"{next(iter(options))}=.*only for models that generate"):
        offramp.enable(model, "fixed", depth=2, **options)
    assert "_offramp_run" not in model.__dict__


def test_fit_record_calibrate(model):
    """The whole path: heads learn to agree with the model, and labels give losses and accuracy."""
    batch = rows(120)
    data = {**batch, "labels": torch.arange(120) % CLASSES}
    offramp.attach(model, at=[2, 4], head="linear")
    report = offramp.fit(model, data, steps=40, batch_size=32, progress=False, lr=3e-3)
    assert report.losses[-1] < report.losses[0]
    trace = offramp.record(model, data, batch_size=32)
    assert len(trace) == 120 and tuple(trace.depths) == (2, 4, DEPTH)
    outcome = offramp.simulate(trace, offramp.policy("confidence", threshold=0.6))
    with offramp.enable(model, "confidence", threshold=0.6) as run:
        found = logits(model, batch)
    assert torch.equal(outcome.depths.cpu(), run.stats.last_depths)
    full = trace.label[:, -1]
    assert outcome.agreement == pytest.approx((found.argmax(-1) == full).double().mean().item())


def test_observe_has_one_row_per_input_row(model):
    batch = {**rows(), "labels": torch.arange(6) % CLASSES}
    backbone = adapt(model)
    seen = backbone.observe(batch, [1, 3])
    assert [tuple(h.shape) for h in [*seen.hidden, seen.final]] == [(6, 32)] * 3
    assert torch.equal(seen.targets, batch["labels"])
    close(backbone.context().readout(seen.final), logits(model, {k: batch[k] for k in ("input_ids", "attention_mask")}))
    assert backbone.observe(batch["input_ids"], [1]).targets is None
    with pytest.raises(BadArgument, match="ids"):
        backbone.observe("text", [1])


def test_shared_blocks_are_counted_per_run():
    backbone = adapt(FAMILIES["albert"]())
    assert backbone.depth == DEPTH and len(set(backbone.names)) == 1
    assert [t.depth for t in backbone.taps()] == list(range(1, DEPTH + 1))


GPT2 = hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=1)
REFUSED = [
    (lambda: hf.BertModel(hf.BertConfig(**SIZES)), "BertModel returns no logits"),
    (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)), r"need one prediction per row, \[rows, classes\]"),
    (lambda: hf.GPT2ForSequenceClassification(GPT2), "score classifies every token and one is picked afterwards"),
    (
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SIZES, conv_kernel_size=3)),
        "something else changes the state between deberta.encoder.layer.0 and deberta.encoder.layer.1",
    ),
    (lambda: FAMILIES["bert"]().bert.encoder.layer[0], "is a part of a transformers model"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_refused_with_the_reason(build, reason):
    model = build()
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    with pytest.raises(UnsupportedModel, match=reason):
        offramp.attach(model, at=[1])
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before


def descriptions(sections):
    """One-line descriptions of the kept Debian packages of the largest sections, and their sections."""
    names, kept = largest(read(find_sample()), sections)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[i].text for i in order], torch.tensor([names.index(kept[i].section) for i in order])


def train_classifier(model, data, n):
    """Fit the model's own readout by logistic regression on its frozen states: seconds, and a fair full model."""
    backbone = adapt(model)
    with torch.no_grad():
        parts = [backbone.observe({k: v[i : i + 64] for k, v in data.items()}, []) for i in range(0, n, 64)]
    features, labels = torch.cat([p.final for p in parts]), torch.cat([p.targets for p in parts])
    readout = backbone.context()
    weights = [*readout.norm.parameters(), *readout.projection.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(readout.readout(features), labels).backward()
        optimizer.step()


@pytest.mark.slow
def test_real_encoder_on_package_descriptions():
    """A real pre-trained encoder: heads, calibration for 10 % disagreement, and the promise kept on held-out rows."""
    folder = encoder_folder()
    texts, labels = descriptions(8)
    words = hf.AutoTokenizer.from_pretrained(folder)
    data = {**words(texts, padding=True, truncation=True, max_length=16, return_tensors="pt"), "labels": labels}
    model = hf.BertForSequenceClassification.from_pretrained(folder, num_labels=8).eval()
    n = len(labels) // 2
    train_classifier(model, data, n)
    part = len(labels) * 3 // 4
    train, calibrate, test = (take(data, slice(a, b)) for a, b in ((0, n), (n, part), (part, None)))
    offramp.attach(model, at=[2, 3, 4, 5], head="linear")
    offramp.fit(model, train, steps=200, batch_size=64, rows=256, lr=2e-3, progress=False)
    cal = offramp.calibrate(offramp.record(model, calibrate, batch_size=64), "confidence", alpha=0.1, delta=0.1)
    assert cal.certificate is not None and cal.certificate.alpha == 0.1
    outcome = offramp.simulate(offramp.record(model, test, batch_size=64), cal.policy)
    full = logits(model, test)
    with offramp.enable(model, cal) as run:
        early = logits(model, test)
    agreement = (early.argmax(-1) == full.argmax(-1)).double().mean().item()
    accuracy = [(x.argmax(-1) == test["labels"]).double().mean().item() for x in (full, early)]
    assert accuracy[0] > 0.6  # eight classes: the full model learnt something
    assert agreement >= 0.85 and run.stats.saved > 0
    assert agreement == pytest.approx(outcome.agreement, abs=0.01)
