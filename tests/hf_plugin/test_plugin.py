"""Which backbone a model gets, and models that come enabled because their config says so."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
import transformers as hf
from torch import nn

import offramp
from offramp._plugins import plugins
from offramp.attach import RECORD
from offramp.enable import RUN
from offramp.errors import BadArgument, UnsupportedModel
from offramp_hf import plugin

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.arange(3, 21).view(2, 9)


def classifier():
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=40, num_labels=4)).eval()


def language_model():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)).eval()


def test_the_plugin_is_found():
    assert plugins().loaded["hf"] is plugin and not plugins().broken


@pytest.mark.parametrize(
    ("build", "name"), [(classifier, "encoder.Encoder"), (language_model, "decoder.Decoder")], ids=["encoder", "lm"]
)
def test_dispatch(build, name):
    found = type(plugin.offramp_adapt(build()))
    assert f"{found.__module__}.{found.__qualname__}" == f"offramp_hf.backbones.{name}"


def test_subclasses_of_the_user_are_claimed():
    class Mine(hf.BertForSequenceClassification):
        pass

    assert plugin.offramp_adapt(Mine(classifier().config)) is not None


def test_models_of_others_are_not_claimed():
    assert plugin.offramp_adapt(nn.Linear(2, 2)) is None


def test_parts_are_refused():
    with pytest.raises(UnsupportedModel, match="BertEncoder is a part of a transformers model"):
        plugin.offramp_adapt(classifier().bert.encoder)


def test_finding_the_plugin_loads_no_framework():
    code = "import sys, offramp_hf.plugin as p; assert not {'transformers', 'peft', 'offramp.auto'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def auto():
    """`offramp.auto`, switched on, and off again whatever the test does."""
    module = import_module("offramp.auto")
    module.off()
    module.on()
    try:
        yield module
    finally:
        module.off()


@pytest.fixture
def saved(tmp_path):
    """A model directory whose config has the flag, and what the model says with its exits."""
    model = classifier()
    exits = offramp.attach(model, at=[2], head="linear")
    with torch.no_grad():
        exits[2].proj.bias += 1.0  # not what an untrained exit says
    with offramp.enable(model, "fixed", depth=2), torch.no_grad():
        early = model(IDS).logits
    exits.save(tmp_path / "exits")
    exits.detach()
    with torch.no_grad():
        full = model(IDS).logits
    model.config.early_exit = {"policy": "fixed", "depth": 2, "exits": str(tmp_path / "exits")}
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", early, full


def test_flag_survives_saving_and_loading(saved):
    folder, early, full = saved
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert RUN not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, full)
        with offramp.enable(model) as run:
            assert torch.equal(model(IDS).logits, early)
            assert run.stats.exits == {2: 2}
        assert torch.equal(model(IDS).logits, full)


@pytest.mark.parametrize("loader", [hf.AutoModelForSequenceClassification, hf.BertForSequenceClassification])
def test_auto_enables_what_is_loaded(saved, auto, loader):
    folder, early, full = saved
    model = loader.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, early)
    model.__dict__[RUN].disable()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, full)


def test_auto_with_loading_info(saved, auto):
    model, info = hf.BertForSequenceClassification.from_pretrained(saved[0], output_loading_info=True)
    assert RUN in model.__dict__ and not info["missing_keys"]


def test_auto_off(saved, auto):
    auto.off()
    before = hf.PreTrainedModel.__dict__["from_pretrained"]
    auto.on()
    assert hf.PreTrainedModel.__dict__["from_pretrained"] is not before
    enabled = hf.BertForSequenceClassification.from_pretrained(saved[0])
    auto.off()
    assert hf.PreTrainedModel.__dict__["from_pretrained"] is before and RUN in enabled.__dict__
    model = hf.BertForSequenceClassification.from_pretrained(saved[0])
    assert not {RUN, RECORD} & set(model.__dict__)


def test_auto_leaves_models_without_the_flag_alone(auto, tmp_path, monkeypatch):
    """Not even looked at: adapting runs a probe, which a model that nobody wants to exit must not pay."""
    monkeypatch.setattr(plugin, "offramp_adapt", None)
    classifier().save_pretrained(tmp_path)
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert not {RUN, RECORD} & set(model.__dict__)


def test_auto_says_what_is_wrong_with_a_flag(saved, auto):
    config = hf.AutoConfig.from_pretrained(saved[0])
    config.early_exit = {"policy": "fixd", "depth": 2}
    with pytest.raises(BadArgument, match="did you mean 'fixed'"):
        hf.BertForSequenceClassification.from_pretrained(saved[0], config=config)


def test_a_later_wrapper_stays(saved, auto):
    """Someone else wrapped `from_pretrained` after us: theirs stays, ours does nothing any more."""
    ours = hf.PreTrainedModel.__dict__["from_pretrained"]
    theirs = classmethod(lambda cls, *args, **kwargs: ours.__func__(cls, *args, **kwargs))
    hf.PreTrainedModel.from_pretrained = theirs
    try:
        auto.off()
        assert hf.PreTrainedModel.__dict__["from_pretrained"] is theirs
        assert RUN not in hf.BertForSequenceClassification.from_pretrained(saved[0]).__dict__
    finally:
        hf.PreTrainedModel.from_pretrained = classmethod(ours.__func__.__wrapped__)


def test_watch_waits_for_the_framework():
    """Switched on before transformers is imported, nothing is imported; once it is, the loader is wrapped."""
    code = (
        "import sys, offramp.auto as auto\n"
        "assert 'transformers.modeling_utils' not in sys.modules\n"
        "from transformers import PreTrainedModel\n"
        "wrapped = PreTrainedModel.__dict__['from_pretrained'].__func__\n"
        "assert wrapped.__wrapped__.__module__.startswith('transformers')\n"
        "auto.off()\n"
        "assert PreTrainedModel.__dict__['from_pretrained'].__func__ is wrapped.__wrapped__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_peft_wrapper_is_refused_with_the_line_to_write():
    from peft import LoraConfig, get_peft_model

    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    tuned = get_peft_model(hf.LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match=r"offramp.attach\(model.get_base_model\(\)"):
        offramp.attach(tuned, at=[1])
