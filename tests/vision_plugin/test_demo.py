"""`offramp demo vision` and `offramp bench heads`, end to end on real images with a tiny classifier."""

import base64
import io
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import offramp
from offramp.cli import build, console
from offramp.report import html, read
from offramp_vision import bench_heads, demo, digits, study
from offramp_vision.study import QUICK, SHAPES, Moved, Shape, batches, fresh, parts
from offramp_vision.training import RECORD, fitted


def tiny():
    from timm.models.vision_transformer import VisionTransformer

    shape = {"embed_dim": 24, "depth": 5, "num_heads": 2}
    return VisionTransformer(img_size=32, patch_size=8, in_chans=1, num_classes=10, **shape)


@pytest.fixture
def small(monkeypatch):
    shapes = (Shape("ViT", "tiny transformer", tiny, (1, 2, 3, 4), 100, 3e-3, "lgvit", {"heads": 4}),)
    for module in (demo, bench_heads):
        monkeypatch.setattr(module, "SHAPES", shapes)
    return shapes[0]


def test_demo_writes_a_report_with_images_and_a_certificate(small, tmp_path):
    result = CliRunner().invoke(build(), ["demo", "vision", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    body = read(tmp_path / "report.json")
    page = (tmp_path / "report.html").read_text()
    assert page == html(body) and body["command"] == "offramp demo vision --quick"
    for section in ("exits", "images", "accuracy", "policies", "scores", "certificate"):
        assert f'<section id="ViT-{section}">' in page
    one = body["runs"][0]
    assert one["certificate"]["n"] == QUICK.calibrate and one["certificate"]["risk"] == "accuracy_drop"
    groups = one["images"]
    assert [g["depth"] for g in groups] == [1, 2, 3, 4, 5]
    assert {g["depth"]: g["count"] for g in groups if g["count"]} == {int(d): n for d, n in one["exits"].items()}
    assert sum(g["count"] for g in groups) == QUICK.test
    right = sum(g["count"] * g["right"] for g in groups if g["count"]) / QUICK.test
    row = one["policies"][0]
    assert right == pytest.approx(row["accuracy"]) == pytest.approx(row["live_accuracy"])
    assert row["speedup"] > 0 and "1,797 handwritten" in body["data"] and 0 <= one["fit"]["accuracy_alone"] <= 1
    shown = next(g["shown"] for g in groups if g["shown"])
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]["png"]))).size == (32, 32)


def test_what_was_fitted_is_loaded_again_and_says_the_same(small, tmp_path, monkeypatch):
    how = study.Plan(train=96, calibrate=32, test=64, share=0.02)
    split = parts(digits.load(1, fonts=False), how)
    model, fit = fitted(small, split, how, tmp_path, console())
    first = offramp.record(model, split[2])
    again, kept = fitted(small, split, replace(how, alpha=0.5), tmp_path, console())
    assert kept == {**fit, "reused": True} and not fit["reused"]
    assert offramp.record(again, split[2]).data_hash == first.data_hash
    assert not fitted(small, split, replace(how, reach=0), tmp_path, console())[1]["reused"]
    (tmp_path / RECORD).write_text("{")
    assert not fitted(small, split, how, tmp_path, console())[1]["reused"]


def test_bench_tells_every_way_at_every_exit(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_heads, "Plan", partial(study.Plan, train=96, calibrate=32, test=64))
    out = tmp_path / "heads.json"
    asked = ["--seeds", "2", "--steps", "2", "--share", "0.02", "--json", str(out)]
    result = CliRunner().invoke(build(), ["bench", "heads", *asked])
    assert result.exit_code == 0, result.output
    body = json.loads(out.read_text())
    assert [row["way"] for row in body["heads"]] == list(bench_heads.WAYS)
    for row in body["heads"]:
        assert row["depths"] == [1, 2, 3, 4] and len(row["seeds"]) == 2
        for k, mean in enumerate(row["accuracy"]):
            assert mean == pytest.approx(sum(one[k] for one in row["seeds"]) / 2)
    # the classifier is frozen: the full model says the same under any heads, and another thing with another seed
    assert len({tuple(one[-1] for one in row["seeds"]) for row in body["heads"]}) == 1
    assert body["command"] == "offramp bench heads --seeds 2 --steps 2 --share 0.02"


def test_the_parts_share_no_image_and_the_order_is_the_seeds():
    found = digits.load(seed=3)
    split = parts(found, study.Plan())
    assert [len(p["labels"]) for p in split][:2] == [1100, 600]
    assert torch.equal(torch.cat([p["x"] for p in split]), found.images[: sum(len(p["x"]) for p in split)])
    again = digits.load(seed=3)
    assert torch.equal(again.images, found.images) and not torch.equal(digits.load(seed=4).images, found.images)


def test_printed_digits_look_like_the_written_ones():
    images, labels = digits.printed()
    written, known = digits.handwritten()
    assert images.shape[1:] == written.shape[1:] == (1, 32, 32) and images.min() >= -1 and images.max() <= 1
    if len(images):  # nearest to the mean of its own digit: a font of symbols would not be
        means = torch.stack([images[labels == d].mean(0).flatten() for d in range(10)])
        nearest = torch.cdist(images.flatten(1), means).argmin(1)
        assert (nearest == labels).double().mean() > 0.7
    alone = digits.load(fonts=False)
    assert len(alone.images) == 1797 and "printed" not in alone.source
    assert known.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_training_images_move_and_stay_the_same_digits():
    part = {"x": torch.arange(4.0).view(4, 1, 1, 1) * torch.ones(4, 1, 8, 8), "labels": torch.arange(4)}
    part["x"][:, :, 3, 3] += 0.5
    source = Moved(part, study.Plan(batch=3, reach=2))
    first, second = list(source), list(source)
    assert [len(b["labels"]) for b in first] == [3, 1]
    places = set()
    for batch in first + second:
        assert torch.equal(batch["x"].flatten(1).amin(1), batch["labels"].float())
        places |= {tuple((image[0] == image.max()).nonzero()[0].tolist()) for image in batch["x"]}
    assert len(places) > 1 and all(1 <= a <= 5 and 1 <= b <= 5 for a, b in places)
    assert [b["labels"].tolist() for b in first] != [b["labels"].tolist() for b in second]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_shapes_are_built_the_same_from_a_seed_and_leave_chance_alone(shape):
    torch.manual_seed(1)
    one, two = fresh(shape, 5), fresh(shape, 5)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one(batches(parts(digits.load(), study.Plan())[0], 2)[0]["x"]).shape == (2, 10)
