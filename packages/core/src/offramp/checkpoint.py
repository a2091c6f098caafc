"""Files: written whole or not at all, read from JSON and safetensors only, checked before anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from offramp.errors import DamagedFile

if TYPE_CHECKING:
    from offramp.attach import Exits

FORMAT = 1
INDEX, WEIGHTS = "exits.json", "exits.safetensors"


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder and rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is private; a saved one is as readable as any other
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    write_bytes(path, text.encode())


def read_bytes(path: Path) -> bytes:
    """Read a file; raises `DamagedFile` when it is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path, newest: int, keys: Iterable[str]) -> dict[str, Any]:
    """Read a JSON object with a `format` number up to `newest` and all of `keys`; raises `DamagedFile`."""
    data = read_bytes(path)
    try:
        body = json.loads(data)
    except ValueError as error:
        raise DamagedFile(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise DamagedFile(f"{path} has no format number; it was not written by offramp")
    if body["format"] > newest:
        raise DamagedFile(
            f"{path} has format {body['format']}, this offramp reads up to {newest}: pip install -U offramp-core"
        )
    missing = [k for k in keys if k not in body]
    if missing:
        raise DamagedFile(f"{path} lacks {', '.join(missing)}")
    return body


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; raises `DamagedFile` when it is truncated or not one."""
    data = read_bytes(path)
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own exception type for every kind of damage
        raise DamagedFile(f"{path} is not a whole safetensors file: {error}") from error
    return tensors, metadata


def sha256(data: bytes) -> str:
    """Return the hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def _own(exits: Exits) -> dict[str, Tensor]:
    """Return the weights that belong into `exits.safetensors`, by depth and name: of heads, and of what stands beside
    them (a gate, a branch)."""
    heads = {depth: exits[depth] for depth in exits.at}
    own = {f"{d}.{k}": v for d, h in heads.items() for k, v in h.own_state().items() if not k.startswith(h.extra)}
    beside = {name: module for name, module in exits.modules.items() if name not in map(str, exits.at)}
    return own | {f"{n}.{k}": v for n, module in beside.items() for k, v in module.state_dict(keep_vars=True).items()}


def save(exits: Exits, directory: str | Path) -> None:
    """Write `exits.json`, `exits.safetensors` and, for LoRA heads, a PEFT adapter; weights first, index last."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _own(exits)
    write_bytes(folder / WEIGHTS, save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
    files = [WEIGHTS, *type(exits[exits.at[0]]).save_extra(exits, folder)]
    body = {
        "format": FORMAT,
        "at": list(exits.at),
        "head": exits.head,
        "config": exits.config,
        **({} if exits.gate is None else {"gate": exits.gate}),
        **({"gate_config": exits.gate_config} if exits.gate_config else {}),
        "model": exits.backbone.fingerprint(),
        "sha256": {name: sha256(read_bytes(folder / name)) for name in files},
    }
    write_text(folder / INDEX, json.dumps(body, indent=2))


def read_index(folder: Path) -> dict[str, Any]:
    """Return the checked contents of `exits.json`; every file it names must be there with the recorded digest."""
    kinds = {"at": list, "head": str, "config": dict, "model": dict, "sha256": dict}
    body = read_json(folder / INDEX, FORMAT, kinds)
    for key, kind in kinds.items():
        if not isinstance(body[key], kind):
            raise DamagedFile(f"{folder / INDEX}: {key} is {body[key]!r}, not a {kind.__name__}")
    if not isinstance(body.get("gate"), str | None):
        raise DamagedFile(f"{folder / INDEX}: gate is {body['gate']!r}, not a name")
    if not isinstance(body.get("gate_config", {}), dict):
        raise DamagedFile(f"{folder / INDEX}: gate_config is {body['gate_config']!r}, not a dict")
    if WEIGHTS not in body["sha256"]:
        raise DamagedFile(f"{folder / INDEX} does not name {WEIGHTS} with its sha256")
    for name in body["sha256"]:
        if Path(name).name != name or name == "..":
            raise DamagedFile(f"{folder / INDEX} names a file outside its folder: {name!r}")
    for name, digest in body["sha256"].items():
        if sha256(read_bytes(folder / name)) != digest:
            raise DamagedFile(f"{folder / name} is not the file that {INDEX} was written with (its sha256 differs)")
    return body


def check_model(body: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    """Raise `DamagedFile` when the directory was written for another architecture, depth, width or vocabulary."""
    for key, value in body["model"].items():
        if found.get(key) != value:
            raise DamagedFile(
                f"{folder} holds exits for {key} {value!r}, this model has {found.get(key)!r}; "
                f"attach and fit new exits: offramp.attach(model, at={body['at']}, head={body['head']!r})"
            )


def restore(exits: Exits, folder: Path) -> None:
    """Copy saved weights into freshly built heads, after checking every name and shape; all or nothing."""
    tensors, _ = read_safetensors(folder / WEIGHTS)
    wanted = _own(exits)
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())
        raise DamagedFile(f"{folder / WEIGHTS}: weights do not match the heads ({', '.join(odd[:4])})")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise DamagedFile(
                f"{folder / WEIGHTS}: {name} has shape {tuple(value.shape)}, the head has {tuple(wanted[name].shape)}"
            )
    type(exits[exits.at[0]]).load_extra(exits, folder)
    for name, value in tensors.items():
        wanted[name].data.copy_(value)
