"""Handwritten digits of scikit-learn, 1,797 real images of 8 x 8: a transformer, an MLP and a convnet, end to end."""

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import offramp
from offramp import _plugins
from offramp._hookspecs import hookimpl
from offramp.backbone import Tap
from offramp.blocks import BlockSpec, Chain
from offramp.testing.toy import ToyBackbone

AT, ALPHA, DELTA = [1, 2, 3], 0.03, 0.1
#: the mean over patches learns in seconds what a class token takes minutes for
POOLED = {"depth": 4, "num_heads": 2, "global_pool": "avg", "class_token": False, "patch_size": 4}


class ConvBlock(nn.Module):
    """A residual block of a convnet; counts the images that it sees."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.seen = 0

    def forward(self, hidden):
        self.seen += len(hidden)
        return hidden + torch.relu(self.conv(self.norm(hidden)))


class ConvNet(nn.Module):
    """Four residual blocks on [batch, width, 8, 8], the mean over places, a norm and a linear layer."""

    def __init__(self, width=24, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([ConvBlock(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden.mean((2, 3))))


class ConvBackbone(ToyBackbone):
    """What offramp asks about a convnet: its blocks take one tensor, and its head reads the mean over places."""

    sequences = False

    def taps(self):
        return [Tap(name, i + 1, self.model.head.in_features, "batch channel") for i, name in enumerate(self.names)]

    def chain(self):
        return Chain(list(self.model.blocks), BlockSpec("hidden"))

    def pool(self, hidden):
        return hidden.mean((2, 3))

    def call(self, batch):
        return self.model(batch["x"] if isinstance(batch, dict) else batch)


class ConvPlugin:
    """A plugin of one model, as a third party would write it."""

    @staticmethod
    @hookimpl
    def offramp_adapt(model):
        return ConvBackbone(model) if isinstance(model, ConvNet) else None


@pytest.fixture
def convnets():
    """Convnets have a backbone while a test runs."""
    report = _plugins.plugins()
    report.manager.register(ConvPlugin, "conv")
    report.loaded["conv"] = ConvPlugin
    yield
    report.manager.unregister(name="conv")
    report.loaded.pop("conv")


@pytest.fixture(scope="module")
def digits():
    """Images [n, 3, 8, 8] and labels in three parts: train, calibrate, test."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1).repeat(1, 3, 1, 1) / 8 - 1
    y = torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [{"x": x[i], "labels": y[i]} for i in (order[:800], order[800:1300], order[1300:])]


def build(kind):
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "num_classes": 10}
    torch.manual_seed(0)
    if kind == "vit":
        return timm.models.vision_transformer.VisionTransformer(**{**shape, **POOLED}).eval()
    if kind == "mlp":
        return timm.models.mlp_mixer.MlpMixer(**shape, num_blocks=4).eval()
    return ConvNet().eval()


@pytest.mark.parametrize("kind", ["vit", "mlp", "cnn"])
def test_digits_end_to_end(kind, digits, convnets):
    """Trained together, certified, and live as simulated: same exits, same answers, blocks that do not run."""
    train, calibrate, test = digits
    model = build(kind)
    offramp.attach(model, at=AT, head="linear")
    options = {"curriculum": "none", "weighting": "uniform", "own": 0.3}
    offramp.fit(
        model, train, loss="layerskip", backbone=True, steps=220, batch_size=64, lr=5e-3, progress=False, **options
    )
    table = offramp.record(model, calibrate, batch_size=64)
    cal = offramp.calibrate(table, "confidence", risk="accuracy_drop", alpha=ALPHA, delta=DELTA)
    assert cal.certificate is not None and cal.certificate.n == 500
    tested = offramp.record(model, test, batch_size=497)
    told = offramp.simulate(tested, cal)
    with offramp.enable(model, cal) as run, torch.no_grad():
        answers = model(test["x"]).argmax(-1)
    assert run.stats.last_depths.tolist() == told.depths.tolist()
    assert answers.tolist() == told.labels.tolist()
    full = offramp.simulate(tested, "never").accuracy
    assert full > 0.9 and told.accuracy >= full - ALPHA and told.saved > 0.2


def test_finished_images_leave_a_convnet(digits, convnets):
    model = ConvNet().eval()
    offramp.attach(model, at=AT, head="linear")
    with offramp.enable(model, "fixed", depth=2), torch.no_grad():
        model(digits[2]["x"][:7])
    assert [block.seen for block in model.blocks] == [7, 7, 0, 0]


def staged(kind):
    """A timm convnet in four stages, or a hierarchy of two, for images of 8 x 8."""
    torch.manual_seed(0)
    if kind == "resnet":
        made = timm.models.resnet
        return made.ResNet(made.BasicBlock, (2, 2, 1, 1), channels=(24, 24, 32, 48), num_classes=10).eval()
    return timm.models.swin_transformer.SwinTransformer(
        img_size=8, patch_size=1, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [*(("resnet", h) for h in ("pooled_linear", "conv")), ("swin", "conv")])
def test_staged_models_end_to_end(kind, head, digits):
    """Blocks change the shape of the state; images leave with certified answers of heads of their own width."""
    train, calibrate, test = digits
    if kind == "resnet":  # its stem halves the image twice
        big = lambda part: {**part, "x": nn.functional.interpolate(part["x"], scale_factor=4)}  # noqa: E731
        train, calibrate, test = big(train), big(calibrate), big(test)
    model = staged(kind)
    steps, lr = (150, 5e-3) if kind == "resnet" else (60, 2e-3)
    offramp.attach(model, at=AT, head=head)
    options = {"curriculum": "none", "weighting": "uniform", "own": 0.3}
    offramp.fit(
        model, train, loss="layerskip", backbone=True, steps=steps, batch_size=64, lr=lr, progress=False, **options
    )
    table = offramp.record(model, calibrate, batch_size=64)
    cal = offramp.calibrate(table, "confidence", risk="accuracy_drop", alpha=ALPHA, delta=DELTA)
    assert cal.certificate is not None
    tested = offramp.record(model, test, batch_size=497)
    told = offramp.simulate(tested, cal)
    with offramp.enable(model, cal) as run, torch.no_grad():
        answers = model(test["x"]).argmax(-1)
    assert run.stats.last_depths.tolist() == told.depths.tolist()
    assert answers.tolist() == told.labels.tolist()
    full = offramp.simulate(tested, "never").accuracy
    assert told.accuracy >= full - ALPHA
    if kind == "resnet":  # a hierarchy of windows learns too slowly for a test: it is here for its exits
        assert full > 0.9 and told.saved > 0.1
