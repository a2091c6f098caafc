"""Data sets of images: folders, pairs, arrow rows; and the commands that take a folder."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

import offramp
from offramp.cli import build
from offramp.errors import BadArgument
from offramp_vision import data as images
from offramp_vision.data import folder, loader

COLOURS = {"blue": (20, 20, 230), "green": (20, 200, 20), "red": (230, 20, 20)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures in three colours, of many sizes, two of them grey."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            shade = tuple(max(0, c - 6 * i) for c in colour)
            Image.new("RGB", (30 + i, 40), shade).save(root / name / f"{i:02}.png")
    return root


class Arrow:
    """Rows by number with the kinds of their columns, as `datasets` gives them."""

    def __init__(self, rows, image="image", label="label"):
        kind = {"Image": type("Image", (), {}), "ClassLabel": type("ClassLabel", (), {"names": list(COLOURS)})}
        self.features = {"id": object(), image: kind["Image"](), label: kind["ClassLabel"]()}
        self.rows, self.keys = rows, (image, label)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"id": index, **dict(zip(self.keys, self.rows[index], strict=True))}

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def tiny(classes=3):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape).eval()


@torch.no_grad()
def test_a_folder_is_preprocessed_as_timm_does_it(pictures):
    from timm.data import create_transform, resolve_model_data_config

    model = tiny()
    offramp.attach(model, [2], "pooled_linear")
    rows = ImageFolder(str(pictures))
    trace = offramp.record(model, rows, batch_size=7)
    assert len(trace) == 36 and trace.targets.tolist() == sorted([0, 1, 2] * 12)
    config = {**resolve_model_data_config(model), "input_size": (3, 32, 32)}
    transform = create_transform(**config, is_training=False)
    said = model(torch.stack([transform(image) for image, _ in rows])).argmax(-1)
    assert said.tolist() == trace.label[:, -1].tolist()


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("photo", "kind")])
def test_arrow_rows_and_pairs_are_the_same_data(pictures, columns):
    model = tiny()
    offramp.attach(model, [2], "pooled_linear")
    rows = folder(pictures)
    one, two = offramp.record(model, rows), offramp.record(model, Arrow(rows, *columns))
    assert one.data_hash == two.data_hash and two.targets is not None
    x = torch.cat([b["x"] for b in loader(rows, model, 3, 8)])
    three = offramp.record(model, TensorDataset(x, one.targets), batch_size=5)
    assert torch.equal(three.label, one.label) and torch.equal(three.targets, one.targets)


def test_fit_on_a_folder_sees_all_classes_and_leaves_chance_alone(pictures):
    """Sorted by class, the rows kept for the report would be of one class only."""
    model = tiny()
    exits = offramp.attach(model, [1, 2], "pooled_linear")
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    offramp.fit(model, folder(pictures), loss="labels", steps=60, lr=1e-2, rows=32, progress=False)
    assert torch.equal(torch.rand(1), wanted)
    trace = offramp.record(model, folder(pictures))
    assert [(trace.label[:, k] == trace.targets).double().mean() > 0.9 for k in (0, 1)] == [True, True]
    offramp.fit(model, folder(pictures), loss="layerskip", backbone=True, steps=4, progress=False)
    exits.detach()


def test_batches_come_in_another_order_each_time_and_in_their_own_without_a_seed(pictures):
    rows, model = folder(pictures), tiny()
    once = loader(rows, model, 3, 36, seed=0)
    first, second = (next(iter(once))["labels"].tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    assert next(iter(loader(rows, model, 3, 36, seed=0)))["labels"].tolist() == first
    assert next(iter(loader(rows, model, 3, 36)))["labels"].tolist() == sorted(first)


def test_a_model_of_one_channel_takes_grey(pictures):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, in_chans=1, img_size=32, depth=2)
    assert next(iter(loader(folder(pictures), model, 3, 4)))["x"].shape == (4, 1, 32, 32)




@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(Image.new("L", (8, 8)), 3)], "row 0 has label 3, and the model has classes 0 to 2"),
        ([(Image.new("L", (8, 8)), -1)], "row 0 has label -1"),
        ([("a.png", 0)], "row 0 holds a str where an image should be"),
        ([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)], "row 0 is a tensor torch.uint8"),
        ([(torch.zeros(2, 3, 32, 32), 0)], r"of shape \[2, 3, 32, 32\]"),
        ([(torch.zeros(3, 32, 32), 0), (torch.zeros(3, 16, 16), 0)], "images of one batch have sizes"),
        ([(torch.zeros(3, 32, 32), 0), (torch.zeros(3, 32, 32), None)], "1 of 2 images of a batch have no label"),
    ],
)
def test_bad_rows_are_named(rows, message):
    model = tiny()
    offramp.attach(model, [2], "pooled_linear")
    source = Arrow(rows, "image", "label")
    source.features = {}
    with pytest.raises(BadArgument, match=message):
        offramp.record(model, source)


def test_bad_sets_are_refused(pictures, tmp_path, monkeypatch):
    model = tiny(classes=5)
    offramp.attach(model, [2], "pooled_linear")
    with pytest.raises(BadArgument, match="3 classes .*model answers with 5.*num_classes=3"):
        offramp.record(model, folder(pictures))
    with pytest.raises(BadArgument, match=r"comes in parts \(train, test\); give one, e.g. data\['train'\]"):
        offramp.fit(model, {"train": folder(pictures), "test": folder(pictures)})
    with pytest.raises(BadArgument, match="batch_size=0 must be a positive number"):
        offramp.record(model, folder(pictures), batch_size=0)
    with pytest.raises(BadArgument, match="each class's images into a folder of its name"):
        folder(tmp_path)
    with pytest.raises(BadArgument, match="takes 5 channels, which no image file has"):
        images.preprocessing(timm.create_model("vit_tiny_patch16_224", in_chans=5, depth=1))

    def broken(name, *rest, original=__import__):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *rest)

    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(BadArgument, match="nms does not exist.*pip install --force-reinstall torchvision"):
        folder(pictures)


def call(*words):
    return CliRunner().invoke(build(), [str(w) for w in words])


def test_fit_record_calibrate_from_the_command_line(pictures, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    weights, exits, trace = tmp_path / "w.safetensors", tmp_path / "exits", tmp_path / "trace.safetensors"
    save_file(model.state_dict(), weights)
    common = ("--model", "timm/resnet10t", "--weights", weights, "--data", pictures, "--batch", 12)
    done = call("fit", *common, "--at", "0.25,0.5", "--steps", 3, "--out", exits, "--json", tmp_path / "fit.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "fit.json").read_text())["at"] == [1, 2] and "held-out images" in done.output
    assert all(f"{what} ━" in done.output for what in ("gather states", "fit exits"))
    done = call("record", f"--model={common[1]}", *common[2:], "--exits", exits, "--out", trace)
    assert done.exit_code == 0 and "record ━" in done.output, done.output
    assert offramp.Trace.load(trace).depths == (1, 2, 4)
    assert call("calibrate", trace, "--risk", "accuracy_drop").exit_code == 0
    model.eval()
    offramp.load(model, exits)
    with torch.no_grad(), offramp.enable(model, "fixed", depth=1) as run:
        model(torch.zeros(2, 3, 176, 176))
    assert run.stats.exits == {1: 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "resnet10t"), "does not say what kind of model it is; name the command"),
        (("--model", "flax/resnet"), "does not say what kind of model it is"),
        (("--model", "timm/no_such_net"), "cannot be built"),
        (("--model", "timm/resnet10t", "--weights", "w.pth"), "only safetensors are read"),
    ],
)
def test_errors_of_the_commands_are_clean(pictures, tmp_path, words, said):
    done = call("fit", *words, "--data", pictures, "--out", tmp_path)
    assert done.exit_code == 1 and said in " ".join(done.output.split()) and "Traceback" not in done.output
