"""One version string: the four distributions share it, and each plugin's range of core contains it."""

import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PLUGINS = ("offramp-hf", "offramp-diffusers", "offramp-vision")
WRITTEN = re.search(r'__version__ = "(.+)"', (ROOT / "packages/core/src/offramp/_version.py").read_text())[1]


def needs(distribution):
    """The hard requirements of an installed distribution, by name."""
    found = [Requirement(line) for line in requires(distribution) or []]
    return {canonicalize_name(r.name): r.specifier for r in found if r.marker is None}


@pytest.mark.parametrize("distribution", ("offramp-core", *PLUGINS))
def test_the_installed_version_is_the_written_one(distribution):
    assert version(distribution) == WRITTEN, "the installed version is stale; run `make install`"


def test_the_module_says_the_same():
    import offramp

    assert offramp.__version__ == WRITTEN


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_takes_this_core_and_not_the_next_minor(plugin):
    core = needs(plugin)["offramp-core"]
    major, minor = map(int, WRITTEN.split(".")[:2])
    assert core.contains(WRITTEN) and not core.contains(f"{major}.{minor + 1}.0")


@pytest.mark.parametrize("distribution", ("offramp-core", *PLUGINS))
def test_the_constraints_are_inside_the_ranges(distribution):
    lines = (ROOT / ".github/constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pins = {canonicalize_name(name): pin for name, pin in pins.items()}
    outside = {n: pins[n] for n, r in needs(distribution).items() if n in pins and not r.contains(pins[n])}
    assert not outside
