"""One contract over 30 timm models: images leave any of them, and the model comes back exactly."""

import math
from dataclasses import dataclass

import pytest
import timm
import torch

import offramp
from offramp._plugins import adapt
from offramp.policy import ExitPolicy
from offramp.testing.backbones import check_backbone

SMALL = {"img_size": 64}
#: name -> options; models of a fixed grid are built for small images, the others take images of any size
MODELS = {
    **dict.fromkeys(
        [
            *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
            *("beit_base_patch16_224", "vit_base_patch16_siglip_224", "cait_xxs24_224", "mixer_s32_224"),
            *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
        ],
        SMALL,
    ),
    "eva02_tiny_patch14_224": {"img_size": 56},
    "maxvit_pico_rw_256": {"img_size": 128},
    **dict.fromkeys(
        [
            *("resnet18", "resnet50", "resnext50_32x4d", "regnety_002", "regnetx_002", "convnext_atto"),
            *("convnextv2_atto", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_035", "mobilenetv3_small_050"),
            *("densenet121", "pvt_v2_b0", "mobilevit_xxs", "mobilevitv2_050", "xcit_nano_12_p16_224"),
            *("edgenext_xx_small", "poolformer_s12", "repvit_m0_9", "ghostnet_050", "focalnet_tiny_srf", "davit_tiny"),
        ],
        {},
    ),
}


@dataclass(frozen=True)
class Plan(ExitPolicy):
    """Row i leaves at the exit with index plan[i]; no such exit: it runs to the end."""

    plan: tuple

    def start(self, batch, device):
        return {"plan": torch.tensor(self.plan[:batch])}

    def step(self, state, seen):
        return state["plan"] == seen.index, state


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """The model, with weights that tell images apart: some fresh models scale their blocks by nearly nothing."""
    torch.manual_seed(0)
    made = timm.create_model(request.param, num_classes=10, **MODELS[request.param])
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "gamma" in name or "layer_scale" in name:
                p.fill_(0.5)
            elif p.dim() > 1 or name.endswith("bias"):
                p.add_(torch.randn_like(p) * (0.02 if p.dim() > 1 else 0.1))
    return made.eval()


@pytest.fixture(scope="module")
def x(model):
    size = {**MODELS, "any": {}}[model.pretrained_cfg.get("architecture", "any")].get("img_size", 64)
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))


def counted(blocks):
    """Count the rows of every real run of every block, under whatever offramp puts over it; returns the undo."""
    seen = [0] * len(blocks)

    def count(i, forward):
        def run(*args, **kwargs):
            seen[i] += len(args[0])
            return forward(*args, **kwargs)

        return run

    for i, block in enumerate(blocks):
        block.__dict__["forward"] = count(i, block.forward)
    return seen, lambda: [block.__dict__.pop("forward") for block in blocks]


def near(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))


def test_the_backbone_contract(model, x):
    backbone = adapt(model)
    check_backbone(backbone, x[:2])
    for tap in backbone.taps():
        assert tap.width > 0 and tap.layout.startswith("batch "), tap
        assert not tap.grid or math.prod(tap.grid) > 0 and tap.reduction > 0, tap


@torch.no_grad()
def test_never_is_the_model_to_the_bit(model, x):
    full = model(x)
    with offramp.attach(model, [0.3, 0.6], "pooled_linear"), offramp.enable(model, "never") as run:
        assert torch.equal(model(x), full)
        assert run.stats.blocks_run == run.stats.blocks_full


@torch.no_grad()
def test_forced_exits_run_the_counted_blocks_and_come_back_in_order(model, x):
    full, plan, keys = model(x), (0, 9, 1, 0, 1, 9), list(model.state_dict())
    exits = offramp.attach(model, [0.3, 0.6], "pooled_linear")
    chain, states = exits.backbone.chain(), exits.observe(x)
    depth, at = exits.backbone.depth, exits.at
    seen, restore = counted(chain.blocks)
    with offramp.enable(model, Plan(plan)) as run:
        out = model(x)
    with offramp.enable(model, "fixed", depth=at[1]) as all_out:
        early = model(x)
    restore()
    wanted = [sum(d > i for d in [*[(*at, depth)[min(p, 2)] for p in plan], *[at[1]] * 6]) for i in range(depth)]
    assert seen == wanted and run.stats.blocks_run + all_out.stats.blocks_run == sum(wanted)
    assert run.stats.last_depths.tolist() == [(*at, depth)[min(p, 2)] for p in plan]
    for row, index in enumerate(plan):
        said = full[row] if index == 9 else exits[at[index]](states.hidden[index])[row]
        assert near(out[row], said), row
    assert near(early, exits[at[1]](states.hidden[1]))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with offramp.enable(model, Plan(tuple(plan[i] for i in order))):
        assert near(model(x[order]), out[order])
    exits.detach()
    assert torch.equal(model(x), full) and list(model.state_dict()) == keys


def test_gradients_reach_heads_and_the_blocks_that_ran(model, x):
    with offramp.attach(model, [0.3, 0.6], "pooled_linear") as exits, offramp.enable(model, Plan((0, 1, 0, 1))):
        model(x[:4]).square().sum().backward()
        blocks = exits.backbone.chain().blocks
        ran = [any(p.grad is not None for p in b.parameters()) for b in blocks]
        heads = [all(p.grad is not None for p in exits[d].parameters()) for d in exits]
    model.zero_grad(set_to_none=True)
    assert all(heads) and ran == [i < exits.at[1] for i in range(len(blocks))]
