"""A small denoiser with random weights, one batch for it, and the marks that attach and enable could leave on it."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from offramp._plugins import adapt
from offramp_diffusers.facts import model_facts


def shake(model):
    """Give every weight its own random value: a fresh denoiser's blocks start as the identity."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def make():
    """Build a DiT of 6 small blocks."""

    def build(**config):
        small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "num_embeds_ada_norm": 1000}
        latents = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2}
        return shake(DiTTransformer2DModel(**{**small, **latents, **config}))

    return build


@pytest.fixture
def shaken():
    """Give every weight of a model its own random value."""
    return shake


@pytest.fixture
def dit(make):
    return make()


@pytest.fixture
def batch():
    return {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "timestep": torch.tensor([999, 500, 250, 1]),
        "class_labels": torch.tensor([1, 2, 3, 1000]),
    }


@pytest.fixture
def marks():
    def read(model):
        return {
            f"{name}.{key}": dict(value) if isinstance(value, dict) else id(value)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
        }

    return read


def noise(*shape):
    return torch.randn(shape)


def dit_family():
    from diffusers import DiTTransformer2DModel as Model

    small = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "patch_size": 2}
    return Model(num_layers=4, **small), lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "timestep": torch.full((b,), 500), "class_labels": torch.arange(b)
    }  # fmt: skip


def pixart():
    from diffusers import PixArtTransformer2DModel as Model

    model = Model(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12),
        "timestep": torch.full((b,), 500), "encoder_attention_mask": torch.ones(b, 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def pixart_alpha():
    from diffusers import PixArtTransformer2DModel as Model

    model = Model(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, cross_attention_dim=24, caption_channels=12, use_additional_conditions=True,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12),
        "timestep": torch.full((b,), 500), "encoder_attention_mask": torch.ones(b, 5),
        "added_cond_kwargs": {"resolution": torch.full((b, 2), 64.0), "aspect_ratio": torch.ones(b, 1)},
    }  # fmt: skip


def sd3():
    from diffusers import SD3Transformer2DModel as Model

    model = Model(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0, 1),
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12),
        "pooled_projections": noise(b, 10), "timestep": torch.full((b,), 500.0),
    }  # fmt: skip


def flux():
    from diffusers import FluxTransformer2DModel as Model

    model = Model(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 16, 4), "encoder_hidden_states": noise(b, 5, 12), "timestep": torch.full((b,), 0.5),
        "pooled_projections": noise(b, 10), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def sana():
    from diffusers import SanaTransformer2DModel as Model

    model = Model(
        in_channels=4, out_channels=4, num_layers=4, num_attention_heads=2, attention_head_dim=8, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12),
        "timestep": torch.full((b,), 500.0),
    }  # fmt: skip


def wan():
    from diffusers import WanTransformer3DModel as Model

    model = Model(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 2, 8, 8), "timestep": torch.full((b,), 500),
        "encoder_hidden_states": noise(b, 5, 12),
    }  # fmt: skip


def qwenimage():
    from diffusers import QwenImageTransformer2DModel as Model

    model = Model(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 16, 16), "encoder_hidden_states": noise(b, 5, 12), "timestep": torch.full((b,), 0.5),
        "encoder_hidden_states_mask": torch.ones(b, 5, dtype=torch.long), "img_shapes": [(1, 4, 4)] * b,
    }  # fmt: skip


def hunyuandit():
    from diffusers import HunyuanDiT2DModel as Model

    model = Model(
        sample_size=8, num_layers=6, patch_size=2, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=16, text_len=4, text_len_t5=4, in_channels=4,
        activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 4, 16),
        "timestep": torch.full((b,), 500.0), "encoder_hidden_states_t5": noise(b, 4, 16),
        "text_embedding_mask": torch.ones(b, 4),
        "text_embedding_mask_t5": torch.ones(b, 4), "image_rotary_emb": (noise(16, 8), noise(16, 8)),
    }  # fmt: skip


def hunyuanvideo():
    from diffusers import HunyuanVideoTransformer3DModel as Model

    model = Model(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=3,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 1, 4, 4), "timestep": torch.full((b,), 500), "guidance": torch.full((b,), 4.0),
        "encoder_hidden_states": noise(b, 5, 16), "pooled_projections": noise(b, 8),
        "encoder_attention_mask": torch.ones(b, 5),
    }  # fmt: skip


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel as Model

    model = Model(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=4, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 2, 4, 8, 8), "encoder_hidden_states": noise(b, 8, 8),
        "timestep": torch.full((b,), 500),
    }  # fmt: skip


def ltx():
    from diffusers import LTXVideoTransformer3DModel as Model

    model = Model(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=4, caption_channels=12,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 32, 4), "encoder_hidden_states": noise(b, 5, 12), "timestep": torch.full((b,), 500),
        "encoder_attention_mask": torch.ones(b, 5), "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def lumina2():
    from diffusers import Lumina2Transformer2DModel as Model

    model = Model(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=12,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12), "timestep": torch.full((b,), 0.5),
        "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
    }  # fmt: skip


def auraflow():
    from diffusers import AuraFlowTransformer2DModel as Model

    model = Model(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=12, pos_embed_max_size=64,
    )  # fmt: skip
    return model, lambda b: {
        "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 12), "timestep": torch.full((b,), 0.5)
    }  # fmt: skip


def uvit():
    from diffusers import UVit2DModel as Model

    model = Model(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=32,
        codebook_size=30, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2, sample_size=4,
        cond_embed_dim=8, encoder_hidden_size=12, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
    )  # fmt: skip
    return model, lambda b: {
        "input_ids": torch.randint(0, 30, (b, 4, 4)), "encoder_hidden_states": noise(b, 5, 12),
        "pooled_text_emb": noise(b, 8), "micro_conds": torch.ones(b, 5),
    }  # fmt: skip


FAMILIES = {
    make.__name__: make
    for make in (
        dit_family, pixart, pixart_alpha, sd3, flux, sana, wan, qwenimage, hunyuandit, hunyuanvideo, cogvideox, ltx,
        lumina2, auraflow, uvit,
    )
}  # fmt: skip


@pytest.fixture
def families():
    """The names of all families."""
    return list(FAMILIES)


@pytest.fixture(params=FAMILIES)
def family(request):
    """A small model of every family with shaken weights, and a function that makes a batch of `n` rows for it."""
    torch.manual_seed(0)
    model, batch = FAMILIES[request.param]()
    return shake(model), batch


class Pass(nn.Module):
    """A block that was taken out: the state goes on as it came."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.fixture
def running():
    """Return the blocks that run at a depth: the first ones, and in a U as many last ones, which read their states."""

    def blocks(model, depth):
        total = adapt(model).depth
        shaped = model_facts(model).long_skips and 2 * depth < total
        return [*range(depth), *(range(total - depth, total) if shaped else ())]

    return blocks


@pytest.fixture
def cut(running):
    """Return the same model with shorter lists of blocks, a U without its middle, and maybe other output layers."""

    def shorter(model, depth, layers=None):
        short, on = copy.deepcopy(model), running(model, depth)
        for name, layer in (layers or {}).items():
            setattr(short, name, copy.deepcopy(layer))
        if len(on) > depth:
            for index in set(range(adapt(model).depth)) - set(on):
                short.blocks[index] = Pass()
            return short
        for name in model_facts(model).lists:
            blocks = getattr(short, name)
            setattr(short, name, nn.ModuleList(list(blocks)[: max(0, depth)]))
            depth -= len(blocks)
        return short

    return shorter
