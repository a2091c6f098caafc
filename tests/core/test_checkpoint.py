"""Exits on disk: written whole or not at all, and refused before anything is changed."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import offramp
from offramp import _registry, checkpoint
from offramp.attach import MODULE, RECORD
from offramp.errors import DamagedFile, NotAttached, OfframpError
from offramp.testing.toy import ToyModel

#: those of the core; a plugin's heads need a model of its framework
HEADS = [
    name
    for name in offramp.names(offramp.ExitHead)
    if _registry.lookup(offramp.ExitHead, name).__module__.startswith("offramp.heads.")
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A name that is no directory is looked for on the hub; here every such look fails at once."""
    import huggingface_hub

    def fail(name, **options):
        raise OSError(f"no hub for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def scramble(exits):
    with torch.no_grad():
        for depth in exits:
            for value in exits[depth].own_state().values():
                value.copy_(torch.randn(value.shape))


@pytest.fixture
def folder(model, tmp_path):
    exits = offramp.attach(model, [2, 4], head="translator", rank=3)
    scramble(exits)
    exits.save(tmp_path / "exits")
    exits.detach()
    return tmp_path / "exits"


def edit(folder, **changes):
    path = folder / "exits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_round_trip_is_bit_exact(tmp_path, x, head, dtype):
    model = ToyModel().eval().to(dtype)
    exits = offramp.attach(model, [2, 4], head=head)
    scramble(exits)
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    exits.save(tmp_path / "a" / "exits")
    exits.detach()
    found = offramp.load(model, tmp_path / "a" / "exits")
    assert (found.at, found.head) == ((2, 4), head)
    after = model.state_dict()
    assert list(after) == list(wanted) and all(torch.equal(after[k], v) for k, v in wanted.items())


def test_the_directory_holds_an_index_and_the_heads_only(folder, model):
    assert sorted(p.name for p in folder.iterdir()) == ["exits.json", "exits.safetensors"]
    body = json.loads((folder / "exits.json").read_text())
    assert body["format"] == 1 and body["at"] == [2, 4] and body["config"] == {"rank": 3}
    assert body["model"] == {"architecture": "ToyModel", "depth": 6, "width": 16, "classes": 5}
    assert {k.split(".")[0] for k in load_file(folder / "exits.safetensors")} == {"2", "4"}
    own = sum(v.numel() for v in load_file(folder / "exits.safetensors").values())
    assert own == 2 * (2 * 16 + 2 * 16 * 3)


def truncate(folder):
    path = folder / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def truncate_and_sign(folder):
    truncate(folder)
    edit(folder, sha256={"exits.safetensors": checkpoint.sha256((folder / "exits.safetensors").read_bytes())})


def flip(folder):
    data = bytearray((folder / "exits.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "exits.safetensors").write_bytes(data)


def rewrite(change):
    def act(folder):
        tensors = load_file(folder / "exits.safetensors")
        change(tensors)
        save_file(tensors, folder / "exits.safetensors")
        edit(folder, sha256={"exits.safetensors": checkpoint.sha256((folder / "exits.safetensors").read_bytes())})

    return act


def other(**changes):
    def act(folder):
        body = json.loads((folder / "exits.json").read_text())
        edit(folder, model={**body["model"], **changes})

    return act


def outside(name):
    return lambda folder: edit(folder, sha256={"exits.safetensors": "", name: "00"})


DAMAGE = {
    "truncated": (truncate, "is not the file that exits.json was written with"),
    "truncated, signed": (truncate_and_sign, "is not a whole safetensors file"),
    "tampered": (flip, "sha256 differs"),
    "newer": (lambda f: edit(f, format=2), "has format 2, this offramp reads up to 1: pip install -U offramp-core"),
    "no format": (lambda f: edit(f, format="new"), "no format number; it was not written by offramp"),
    "not json": (lambda f: (f / "exits.json").write_text("{"), "is not JSON"),
    "a list": (lambda f: (f / "exits.json").write_text("[]"), "no format number"),
    "key gone": (
        lambda f: (f / "exits.json").write_text('{"format": 1, "at": [2]}'),
        "lacks head, config, model, sha256",
    ),
    "no digest": (lambda f: edit(f, sha256={}), "does not name exits.safetensors"),
    "odd digests": (lambda f: edit(f, sha256=["exits.safetensors"]), "sha256 is .*, not a dict"),
    "odd config": (lambda f: edit(f, config=[3]), "config is .*, not a dict"),
    "odd at": (lambda f: edit(f, at="24"), "at is '24', not a list"),
    "odd depths": (lambda f: edit(f, at=["2", "4"]), "tap '2'"),
    "depth outside": (lambda f: edit(f, at=[2, 40]), "tap 40 is outside the model"),
    "unknown head": (lambda f: edit(f, head="tide"), "did you mean 'tied'"),
    "unknown option": (lambda f: edit(f, config={"rang": 3}), "did you mean 'rank'"),
    "weights gone": (lambda f: (f / "exits.safetensors").unlink(), "exits.safetensors cannot be read"),
    "index gone": (lambda f: (f / "exits.json").unlink(), "exits.json cannot be read"),
    "outside": (outside("../secret"), "names a file outside its folder: '../secret'"),
    "absolute": (outside("/etc/passwd"), "outside its folder: '/etc/passwd'"),
    "parent": (outside(".."), "outside its folder: '..'"),
    "other architecture": (other(architecture="Llama"), "for architecture 'Llama', this model has 'ToyModel'"),
    "other width": (other(width=32), "for width 32, this model has 16"),
    "other vocabulary": (
        other(classes=9),
        r"for classes 9, this model has 5; attach and fit new exits: offramp.attach\(",
    ),
    "other depth": (other(depth=12), "for depth 12, this model has 6"),
    "name gone": (rewrite(lambda t: t.pop("2.down.weight")), r"do not match the heads \(2.down.weight\)"),
    "name more": (rewrite(lambda t: t.update(extra=torch.zeros(1))), r"do not match the heads \(extra\)"),
    "shape": (
        rewrite(lambda t: t.update({"2.up.weight": torch.zeros(2)})),
        r"2.up.weight has shape \(2,\), the head has",
    ),
    "swapped exits": (lambda f: edit(f, at=[2, 5]), "do not match the heads"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_model_unchanged(folder, model, x, marks, case):
    damage, message = DAMAGE[case]
    damage(folder)
    before, keys, full = marks(model), list(model.state_dict()), model(x)
    with pytest.raises(OfframpError, match=message) as error:
        offramp.load(model, folder)
    assert marks(model) == before and list(model.state_dict()) == keys and torch.equal(model(x), full)
    if case not in ("odd depths", "depth outside", "unknown head", "unknown option"):
        assert isinstance(error.value, DamagedFile) and str(folder) in str(error.value)


@pytest.mark.parametrize("change", [{"width": 32}, {"classes": 9}, {"depth": 4}])
def test_exits_of_another_model(folder, marks, change):
    model = ToyModel(**change)
    before = marks(model)
    with pytest.raises(DamagedFile, match="attach and fit new exits"):
        offramp.load(model, folder)
    assert marks(model) == before and RECORD not in model.__dict__ and not hasattr(model, MODULE)


@pytest.mark.parametrize("name", ["no/such/dir", "somebody/some-model"])
def test_neither_a_directory_nor_on_the_hub(model, marks, name):
    before = marks(model)
    with pytest.raises(DamagedFile, match=f"'{name}' is neither a directory nor a hub id.*no hub"):
        offramp.load(model, name)
    assert marks(model) == before


def test_a_hub_id_is_fetched(folder, model, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or folder,
    )
    assert offramp.load(model, "me/my-exits").at == (2, 4)
    assert asked == [("me/my-exits", ["*.json", "*.safetensors"])]


def test_load_on_a_model_with_exits(folder, model):
    exits = offramp.attach(model, 3)
    with pytest.raises(NotAttached, match="already has exits"):
        offramp.load(model, folder)
    assert exits[3] is not None


def test_save_without_exits_writes_nothing(model, tmp_path):
    exits = offramp.attach(model, 2)
    exits.detach()
    with pytest.raises(NotAttached):
        exits.save(tmp_path / "new")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("step", ["write", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file.json"
    checkpoint.write_text(path, "old")

    class Full:
        def __init__(self, handle, mode):
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def write(self, data):
            raise error

    def refuse(*args):
        raise error

    if step == "write":
        monkeypatch.setattr(checkpoint.os, "fdopen", Full)
    else:
        monkeypatch.setattr(checkpoint.Path, "replace", refuse)
    with pytest.raises(error):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.json"
    checkpoint.write_text(path, "old")
    checkpoint.write_text(path, "é")
    assert path.read_bytes() == "é".encode() and [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_save_that_fails_leaves_old_exits_that_load(folder, model, monkeypatch):
    """The weights are written first, so a failure before them must leave everything as it was."""
    exits = offramp.load(model, folder)
    scramble(exits)

    def refuse(path, data):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_bytes", refuse)
    with pytest.raises(OSError, match="disk full"):
        exits.save(folder)
    exits.detach()
    assert offramp.load(model, folder).at == (2, 4)


def test_metadata_and_tensors_are_read_back(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / "t", {"k": "v"})
    tensors, metadata = checkpoint.read_safetensors(tmp_path / "t")
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"k": "v"}
