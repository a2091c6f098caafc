"""Imports point one way. The rules are data, the check is AST, and the last tests prove that the check can fail."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
CORE = "offramp"
PLUGINS = ("offramp_hf", "offramp_diffusers", "offramp_vision")
FRAMEWORKS = {"transformers", "diffusers", "timm", "peft", "torchvision", "accelerate"}
CORE_MAY_USE = {"torch", "numpy", "scipy", "pluggy", "safetensors", "typer", "rich", "triton", "optuna"}

CONTRACTS = {f"offramp.{name}" for name in ("policy", "head", "gate", "calibrator", "backbone", "loss", "errors")}
FOLDERS = tuple(f"offramp.{name}" for name in ("policies", "heads", "gates", "calibrators", "losses"))
MACHINES = {"offramp.engine", "offramp.attach", "offramp.fit"}


def inside(module, *packages):
    """Is the module one of the packages or in one of them?"""
    return any(module == p or module.startswith(p if p.endswith("._") else p + ".") for p in packages)


def module_name(path, source):
    """`.../src/offramp/policies/never.py` -> `offramp.policies.never`."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def every_module():
    """All modules of the four packages, by name, with their source text."""
    sources = sorted(PACKAGES.glob("*/src"))
    return {module_name(p, s): p for s in sources for p in sorted(s.rglob("*.py"))}


def for_types_only(node):
    """Is it an `if TYPE_CHECKING:` block? Nothing in it is imported at run time."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def statements(tree, *, late=True):
    """Walk what runs; with `late=False` only what runs at import, not the bodies of functions."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        if not late and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        stack += node.orelse if for_types_only(node) else ast.iter_child_nodes(node)


def imports(text, name, known, *, package=False, late=True):
    """What a module imports, as full names: of ours down to the module, of others down to the imported name."""
    found = set()
    for node in statements(ast.parse(text), late=late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: len(name.split(".")) + package - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known or not inside(base, CORE, *PLUGINS) else base)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def allowed_of_ours(name):
    """The packages of ours a core module may import at run time; None where the rules leave it free."""
    if inside(name, "offramp.kernels"):
        return ("offramp.kernels", "offramp.errors")  # the one family of errors, which imports nothing
    if name in CONTRACTS:
        return tuple(CONTRACTS)
    for folder in FOLDERS:
        if name.startswith(folder + "."):
            # calibrators work on traces; `_shared.py` files of a folder belong to the folder
            more = (
                ("offramp.calibration", "offramp.trace", "offramp.simulate", "offramp.risks", "offramp.pvalues")
                if "calibrators" in folder
                else ()
            )
            return (*CONTRACTS, "offramp.kernels", "offramp._registry", f"{folder}._", *more)
    return None


def core_offences(name, used):
    """Rules of the core: no framework, no plugin, no library beyond its dependencies, and its layers."""
    for other in sorted(used):
        top = other.split(".")[0]
        ours = top == CORE
        if top in FRAMEWORKS or top in PLUGINS:
            yield f"{name} imports {other}: core knows no framework and no plugin"
        elif not ours and top not in CORE_MAY_USE and top not in sys.stdlib_module_names:
            yield f"{name} imports {other}, which is no dependency of core"
        elif not ours and inside(name, "offramp.kernels") and top in CORE_MAY_USE - {"torch", "triton"}:
            yield f"{name} imports {other}: kernels use torch only"
        elif ours and (allowed := allowed_of_ours(name)) and not inside(other, *allowed):
            yield f"{name} imports {other}; it may import {', '.join(sorted(allowed))}"
        elif ours and name in MACHINES and inside(other, *FOLDERS):
            yield f"{name} imports {other}: machinery goes through the contracts and the registry"


def plugin_offences(name, used, at_import):
    """Rules of the plugins: never one another; discovery is cheap; private API only in _compat and backbones."""
    own = name.split(".")[0]
    for other in sorted(used):
        top = other.split(".")[0]
        if top in PLUGINS and top != own:
            yield f"{name} imports {other}: plugins never import one another"
        private = top in FRAMEWORKS and any(part.startswith("_") for part in other.split("."))
        if private and not inside(name, f"{own}._compat", f"{own}.backbones"):
            yield f"{name} imports the private {other}; that belongs to _compat.py or backbones/"
    if name in (own, f"{own}.plugin"):
        yield from (
            f"{name} imports {other} at import; finding a plugin must not load its framework"
            for other in sorted(at_import)
            if other.split(".")[0] in FRAMEWORKS
        )


def offences(name, text, known, *, package=False):
    """Every broken rule of one module, in words."""
    used = imports(text, name, known, package=package)
    if inside(name, CORE):
        return list(core_offences(name, used))
    return list(plugin_offences(name, used, imports(text, name, known, package=package, late=False)))


MODULES = every_module()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    path = MODULES[name]
    found = offences(name, path.read_text(), MODULES, package=path.name == "__init__.py")
    assert not found, "\n".join(found)


BAD = [
    ("offramp.kernels.compact", "import numpy"),
    ("offramp.kernels.compact", "from offramp import policy"),
    ("offramp.policy", "from offramp import kernels"),
    ("offramp.head", "from .engine import Engine"),
    ("offramp.policies.patience", "from offramp.policies.never import Never"),
    ("offramp.policies.patience", "from .never import Never"),
    ("offramp.heads.tied", "from offramp.engine import run"),
    ("offramp.engine", "def f():\n    from offramp.policies import never"),
    ("offramp.trace", "import pandas"),
    ("offramp.attach", "def f():\n    import transformers"),
    ("offramp.attach", "import offramp_hf"),
    ("offramp.cli", "import importlib\nimportlib.import_module('timm')"),
    ("offramp_hf.cache", "import offramp_vision"),
    ("offramp_hf.plugin", "import transformers"),
    ("offramp_hf.plugin", "try:\n    import peft\nexcept ImportError:\n    peft = None"),
    ("offramp_diffusers.schedules.fixed", "from diffusers.hooks._common import x"),
]
GOOD = [
    ("offramp.policies.patience", "import torch\nfrom offramp import kernels\nfrom offramp.policy import ExitPolicy"),
    ("offramp.policy", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from offramp.trace import Trace"),
    ("offramp_hf.plugin", "def offramp_adapt(model):\n    import transformers"),
    ("offramp_diffusers._compat", "from diffusers.hooks._common import x"),
    ("offramp_vision.backbones.vit", "import timm\nfrom offramp.backbone import Backbone"),
]
KNOWN = {*CONTRACTS, "offramp.engine", "offramp.kernels", "offramp.policies.never", "offramp.trace"}


@pytest.mark.parametrize(("name", "text"), BAD)
def test_the_check_can_fail(name, text):
    assert offences(name, text, KNOWN)


@pytest.mark.parametrize(("name", "text"), GOOD)
def test_the_check_can_pass(name, text):
    assert not offences(name, text, KNOWN)
