"""One name everywhere: the stem of a file is the registry key of the one class it registers."""

from pathlib import Path

import pytest

import offramp
from offramp import _plugins, _registry

ROOT = Path(__file__).parents[2]
KINDS = {
    "policies": offramp.ExitPolicy,
    "heads": offramp.ExitHead,
    "gates": offramp.ExitGate,
    "calibrators": offramp.Calibrator,
    "losses": offramp.Loss,
    "drafting": offramp.DraftRule,
}
FILES = [
    (folder, path)
    for folder in KINDS
    for path in sorted(ROOT.glob(f"packages/*/src/*/{folder}/*.py"))
    if not path.name.startswith("_")
]


@pytest.fixture(autouse=True, scope="module")
def plugins():
    """Plugins bring names of their own; they must be loaded to be listed."""
    return _plugins.plugins()


@pytest.mark.parametrize(("folder", "path"), FILES, ids=[f"{folder}-{path.stem}" for folder, path in FILES])
def test_the_file_registers_its_own_name_and_no_other(folder, path):
    kind = KINDS[folder]
    found = _registry.lookup(kind, path.stem)
    module = f"{path.parents[1].name}.{folder}.{path.stem}"
    assert issubclass(found, kind) and found.__module__ == module
    registered = {name for name in _registry.names(kind) if _registry.lookup(kind, name).__module__ == module}
    assert registered == {path.stem}


@pytest.mark.parametrize("folder", KINDS)
def test_every_name_is_a_file(folder):
    """Names of other people's plugins may be installed beside ours; ours all have a file."""
    kind = KINDS[folder]
    assert offramp.names(kind) == _registry.names(kind)
    ours = {n for n in offramp.names(kind) if _registry.lookup(kind, n).__module__.split(".")[0].startswith("offramp")}
    assert ours == {path.stem for f, path in FILES if f == folder}
