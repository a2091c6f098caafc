"""The shape of the repository, and the laws of its source that no other tool checks."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {"packages", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile", ".ci", ".github", ".gitignore"}
PACKAGES = {"core", "hf-plugin", "diffusers-plugin", "vision-plugin"}
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
LONGEST_FUNCTION, LONGEST_FILE, LONGEST_KERNEL = 60, 300, 500


def tracked():
    """The files git tracks; skips outside a clone, and there alone: a git that fails in one is an error."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in git.stdout.split("\0") if name]


def test_top_level():
    assert {name.split("/")[0] for name in tracked()} == TOP


def test_packages():
    assert {name.split("/")[1] for name in tracked() if name.startswith("packages/")} == PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_is_whole(package):
    """Real files: a linked LICENSE makes a source distribution that pip refuses."""
    folder = ROOT / "packages" / package
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        assert (folder / name).is_file() and not (folder / name).is_symlink(), name
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert len(list(folder.glob("src/*/py.typed"))) == 1


def test_no_package_brings_tool_settings():
    for project in ROOT.glob("packages/*/pyproject.toml"):
        tools = [line for line in project.read_text().splitlines() if line.startswith("[tool.")]
        assert all(line.startswith("[tool.hatch.") for line in tools), project


def test_tests_are_no_packages():
    """An `__init__.py` here could shadow an installed framework, whatever the import mode."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def functions(tree):
    """All functions and methods of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def too_long(path, text):
    """Files and functions beyond the limits."""
    limit = LONGEST_KERNEL if "kernels" in path.parts else LONGEST_FILE
    if (lines := len(text.splitlines())) > limit:
        yield f"{path.name} has {lines} lines; the limit is {limit}"
    for node in functions(ast.parse(text)):
        if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
            yield f"{path.name}:{node.lineno} {node.name} has {lines} lines; the limit is {LONGEST_FUNCTION}"


def forbidden(path, text):
    """Statements that have no place in a library."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            yield f"{path.name}:{node.lineno} assert: raise an error that says what to do"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{path.name}:{node.lineno} bare except: it would swallow Ctrl-C"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if path.name != "cli.py":
                yield f"{path.name}:{node.lineno} print: only the command line prints"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: "/".join(p.parts[p.parts.index("src") + 1 :]))
def test_source_keeps_the_laws(path):
    found = [*too_long(path, path.read_text()), *forbidden(path, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["assert x", "try:\n    x\nexcept:\n    pass", "print(x)"])
def test_forbidden_can_fail(text):
    assert list(forbidden(Path("a.py"), text)) and not list(forbidden(Path("a.py"), "raise ValueError(x)"))


@pytest.mark.parametrize(("name", "broken"), [("engine.py", True), ("kernels/compact.py", False)])
def test_too_long_can_fail(name, broken):
    assert bool(list(too_long(Path(name), "x = 1\n" * 301))) is broken
    assert list(too_long(Path(name), "def f():\n" + "    x = 1\n" * 60))
