"""The `lora` head: ordinary PEFT layers on the heads, files that PEFT reads, a base that is never merged into."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import offramp
from offramp.errors import BadArgument, DamagedFile, NotAttached, UnknownName
from offramp.head import HeadContext
from offramp.testing.heads import check_head
from offramp.testing.toy import ToyModel, toy_plugin
from offramp_hf.heads.lora import ADAPTER, TiedLora, untie

IDS = torch.arange(3, 27).view(2, 12)
HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
MINE = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def tiny(tied=False):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4, tie_word_embeddings=tied)).eval()


def trained(model, **config):
    """Attach, and give every weight of the heads a value as if trained."""
    exits = offramp.attach(model, at=[1, 3], head="lora", **{"r": 4, **config})
    torch.manual_seed(7)
    for depth in exits:
        nn.init.normal_(exits[depth].proj.lora_B[ADAPTER].weight)
        nn.init.normal_(exits[depth].exit_norm.weight)
    return exits


@torch.no_grad()
def says(exits):
    return torch.stack([exits[d](HIDDEN) for d in exits])


def snapshot(model):
    """Everything that must be there again after detach."""
    with torch.no_grad():
        logits = model(IDS).logits
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    active = {n: (m.active_adapters, m.disable_adapters) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    attributes = sorted(model.__dict__), sorted(model.__dict__["_modules"])
    listed = sorted(getattr(model, "peft_config", None) or {})
    return list(model.state_dict()), flags, active, attributes, listed, model._hf_peft_config_loaded, logits


def same(before, after):
    return before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])


@pytest.mark.parametrize("tied", [False, True])
def test_untrained_it_is_the_logit_lens_and_shares_the_unembedding(tied):
    model = tiny(tied)
    before = snapshot(model)
    exits = offramp.attach(model, at=[1, 3], head="lora")
    with torch.no_grad():
        lens = model.lm_head(model.model.norm(HIDDEN))
        assert torch.equal(exits[1](HIDDEN), lens)
        assert torch.equal(exits[1](HIDDEN[0]), model.lm_head(model.model.norm(HIDDEN[0])))
        assert exits[1](HIDDEN.view(5, 1, 32)).shape == (5, 1, 61)
    assert exits[1].proj.get_base_layer().weight is model.lm_head.weight
    assert set(model.state_dict()) - set(before[0]) == {
        f"exits.{d}.{n}" for d in (1, 3)
        for n in ("exit_norm.weight", f"proj.lora_A.{ADAPTER}.weight", f"proj.lora_B.{ADAPTER}.weight")
    }  # fmt: skip
    assert exits[1].proj.scaling[ADAPTER] == 2.0
    assert torch.equal(model(IDS).logits, before[-1])
    model.to(torch.float64)
    assert exits[1].proj.get_base_layer().weight is model.lm_head.weight
    assert exits[1](HIDDEN.double()).dtype == torch.float64


def test_forward_is_peft_s_and_projects_once():
    model = tiny()
    exits, calls = trained(model), []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        mine = exits[3](HIDDEN)
    assert calls == [1]
    handle.remove()
    with torch.no_grad():
        theirs = super(TiedLora, exits[3].proj).forward(exits[3].exit_norm(HIDDEN))
    torch.testing.assert_close(mine, theirs)
    hidden = HIDDEN.clone().requires_grad_()
    exits[3](hidden).square().sum().backward()
    assert model.lm_head.weight.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exits[3].parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_detach_is_exact(tied):
    model = tiny(tied)
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    exits = trained(model)
    assert ADAPTER in model.peft_config
    assert model._hf_peft_config_loaded
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("exits.")
    }  # as after model.add_adapter: only the adapter trains
    exits.detach()
    assert same(before, snapshot(model))
    with pytest.raises(NotAttached, match="detached"):
        exits.modules  # noqa: B018


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_are_bit_exact(tmp_path, tied):
    exits = trained(tiny(tied), alpha=3.0, dropout=0.1)
    exits.save(tmp_path)
    other = tiny(tied)
    loaded = offramp.load(other, tmp_path)
    assert torch.equal(says(loaded), says(exits))
    assert loaded[1].proj.scaling[ADAPTER] == 0.75
    index = json.loads((tmp_path / "exits.json").read_text())
    assert {"adapter_config.json", "adapter_model.safetensors", "exits.safetensors"} == set(index["sha256"])
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (4, 3.0, 0.1, True)
    assert {k.split(".")[1] for k in load_file(tmp_path / "exits.safetensors")} == {"exit_norm"}


def test_the_directory_is_an_adapter_for_load_adapter(tmp_path):
    exits = trained(tiny())
    exits.save(tmp_path)
    model = tiny()
    fresh = offramp.attach(model, at=[1, 3], head="lora", r=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = model(IDS).logits
    model.load_adapter(str(tmp_path), adapter_name="second")
    assert {ADAPTER, "second"} == set(model.peft_config)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in before.items())
    for depth in exits:
        fresh[depth].exit_norm.load_state_dict(exits[depth].exit_norm.state_dict())
    assert torch.equal(says(fresh), says(exits))
    model.set_adapter(ADAPTER)
    assert not torch.equal(says(fresh), says(exits))
    assert torch.equal(model(IDS).logits, logits)
    fresh.detach()  # "second" lived on the heads only, so it goes with them
    assert "peft_config" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_the_adapter_merges_elsewhere_into_heads_with_their_own_projection(tmp_path):
    exits = trained(tiny())
    exits.save(tmp_path)
    model = tiny()
    own = offramp.attach(model, at=[1, 3], head="linear")
    for depth in exits:
        own[depth].exit_norm.load_state_dict(exits[depth].exit_norm.state_dict())
    logits = model(IDS).logits
    PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload()
    assert type(own[1].proj) is nn.Linear
    torch.testing.assert_close(says(own), says(exits), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(IDS).logits, logits)


def test_disabling_adapters_leaves_the_norm_and_enabling_brings_the_head_back():
    model = tiny()
    exits = trained(model)
    full = says(exits)
    model.disable_adapters()
    with torch.no_grad():
        assert torch.equal(exits[1](HIDDEN), model.lm_head(exits[1].exit_norm(HIDDEN)))
    model.enable_adapters()
    assert torch.equal(says(exits), full)


@pytest.mark.parametrize("how", ["layer", "merge_adapter", "merge_and_unload", "safe"])
def test_merging_into_the_shared_unembedding_is_refused(tmp_path, how):
    model = tiny(tied=True)
    exits = trained(model)
    exits.save(tmp_path)
    before, full = model.lm_head.weight.clone(), says(exits)
    with pytest.raises(BadArgument, match=r"offramp_hf\.heads\.lora\.untie\(exits\)"):
        if how == "layer":
            exits[1].proj.merge()
        elif how == "safe":
            exits[1].proj.merge(safe_merge=True, adapter_names=[ADAPTER])
        else:
            getattr(PeftModel.from_pretrained(model, str(tmp_path), adapter_name="other"), how)()
    assert torch.equal(model.lm_head.weight, before)
    assert isinstance(exits[1].proj, TiedLora)
    torch.testing.assert_close(says(exits), full)


def test_merging_only_the_user_s_adapter_leaves_the_heads_alone():
    model = tiny()
    exits = trained(model)
    full = says(exits)
    PeftModel(model, MINE, adapter_name="mine").merge_and_unload(adapter_names=["mine"])
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(exits[1].proj, TiedLora)
    assert torch.equal(says(exits), full)
    exits.detach()
    assert not any("lora" in k or "exits" in k for k in model.state_dict())


def test_untie_gives_linear_heads_that_say_the_same():
    model = tiny(tied=True)
    exits = trained(model)
    full, before = says(exits), model(IDS).logits
    own = untie(exits)
    assert own.head == "linear"
    torch.testing.assert_close(says(own), full, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(IDS).logits, before)
    assert "peft_config" not in model.__dict__


def test_an_adapter_of_the_user_s_own_survives_attach_and_detach(tmp_path):
    model = tiny()
    model.add_adapter(MINE, adapter_name="mine")
    model.lm_head.weight.requires_grad_(True)
    before = snapshot(model)
    exits = trained(model)
    assert set(model.peft_config) == {"mine", ADAPTER}
    assert model.active_adapters() == ["mine"]
    assert torch.equal(model(IDS).logits, before[-1])
    full = says(exits)
    model.set_adapter("mine")  # chooses for the backbone; the heads keep theirs
    assert torch.equal(says(exits), full)
    exits.save(tmp_path)
    assert not any("q_proj" in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    exits.detach()
    assert same(before, snapshot(model))


def test_an_adapter_that_the_user_adds_after_attach_stays():
    model = tiny()
    exits = trained(model)
    model.add_adapter(MINE, adapter_name="mine")
    assert not model.lm_head.weight.requires_grad
    logits = model(IDS).logits
    exits.detach()
    assert list(model.peft_config) == ["mine"]
    assert model._hf_peft_config_loaded
    assert torch.equal(model(IDS).logits, logits)
    assert not model.lm_head.weight.requires_grad
    again = trained(model)
    with pytest.raises(BadArgument, match="detach first"):
        again[1].proj.merge()
    again[1].proj.merge(adapter_names=["mine"])  # not on this layer


def test_an_adapter_of_the_same_name_is_not_overwritten():
    model = tiny()
    model.add_adapter(MINE, adapter_name=ADAPTER)
    before = snapshot(model)
    with pytest.raises(BadArgument, match="delete_adapter"):
        offramp.attach(model, at=[1], head="lora")
    assert same(before, snapshot(model))


def test_a_deep_copy_has_exits_of_its_own():
    model = tiny(tied=True)
    before = snapshot(model)
    exits = trained(model)
    twin = copy.deepcopy(model)
    theirs = twin.__dict__["_offramp_exits"]
    assert theirs[1].proj.get_base_layer().weight is twin.lm_head.weight
    full = says(exits)
    assert torch.equal(says(theirs), full)
    theirs.detach()
    assert same(before, snapshot(twin))
    assert torch.equal(says(exits), full)
    assert ADAPTER in model.peft_config


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_contract_holds_on_a_language_model(tied):
    check_head("lora", tiny(tied), r=4)


def test_models_of_other_libraries_get_the_layers_and_no_peft_attributes(tmp_path):
    check_head("lora", r=4)
    with toy_plugin():
        model = ToyModel()
        before = set(model.__dict__)
        with offramp.attach(model, at=[1, 2], head="lora", r=4) as exits:
            assert isinstance(exits[1].proj, LoraLayer)
            assert set(model.__dict__) - before == {"_offramp_exits"}
            assert all(p.requires_grad for p in model.parameters())
            nn.init.normal_(exits[2].proj.lora_B[ADAPTER].weight)
            exits.save(tmp_path)
            state = {k: v.clone() for k, v in exits.modules.state_dict().items()}
        loaded = offramp.load(model, tmp_path).modules.state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in state.items())


def tamper(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path)


def test_a_tampered_adapter_is_refused_and_nothing_stays(tmp_path):
    trained(tiny()).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = weights.read_bytes()
    model = tiny()
    before = snapshot(model)
    key = "base_model.model.exits.1.proj.lora_A.weight"
    for bad in (good[:-4] + b"abcd", good[:200], b""):
        weights.write_bytes(bad)
        with pytest.raises(DamagedFile, match=r"adapter_model\.safetensors"):
            offramp.load(model, tmp_path)
    index = json.loads((tmp_path / "exits.json").read_text())
    for change in (
        lambda t: {**t, key: t[key][:2]},
        lambda t: {k: v for k, v in t.items() if k != key},
        lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(61, 32)},
    ):
        weights.write_bytes(good)
        tamper(weights, change)
        del index["sha256"]["adapter_model.safetensors"]  # also for one who edits the index
        (tmp_path / "exits.json").write_text(json.dumps(index))
        index["sha256"]["adapter_model.safetensors"] = ""
        with pytest.raises(DamagedFile, match="do not match the heads"):
            offramp.load(model, tmp_path)
    weights.unlink()
    with pytest.raises(DamagedFile, match="cannot be read"):
        offramp.load(model, tmp_path)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"r": 0}, "r=16"), ({"r": 2.0}, "whole number"), ({"alpha": 0}, "above 0"), ({"dropout": 1.0}, "below 1")],
)
def test_options_outside_their_range(options, words):
    model = tiny()
    before = snapshot(model)
    with pytest.raises(BadArgument, match=words):
        offramp.attach(model, at=[1], head="lora", **options)
    with pytest.raises(UnknownName, match="rank"):
        offramp.attach(model, at=[1], head="lora", rank=4)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("projection", [nn.Sequential(nn.Linear(32, 61)), nn.Identity(), nn.Conv1d(32, 61, 1)])
def test_an_unembedding_that_is_not_one_matrix_is_refused(projection):
    from offramp_hf.heads.lora import Lora

    base = HeadContext(nn.Identity(), projection, lambda x: x, 32, 61)
    with pytest.raises(BadArgument, match=f"{type(projection).__name__}.*head='tied'"):
        Lora.build(None, base)


def test_unloaded_adapters_are_reported_when_saving(tmp_path):
    model = tiny()
    exits = trained(model)
    model.delete_adapter(ADAPTER)
    with pytest.raises(NotAttached, match="deleted or unloaded"):
        exits.save(tmp_path)
    exits.detach()
    assert "peft_config" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_half_precision_and_train_mode():
    model = tiny().to(torch.bfloat16).train()
    exits = offramp.attach(model, at=[1], head="lora", dropout=0.5)
    assert exits[1].proj.lora_dropout.training
    assert exits[1].proj.lora_A[ADAPTER].weight.dtype == torch.bfloat16
    assert exits[1](HIDDEN.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(exits[1](HIDDEN.bfloat16()), model.lm_head(model.model.norm(HIDDEN.bfloat16())))
