"""C++ kernels are compiled once, loaded whole, and recorded as calls."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from offramp.kernels import _select
from offramp.kernels.cpp import _build
from offramp.kernels.head_stats import head_stats


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own, and how often the compiler ran."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OFFRAMP_KERNELS", "cpp")
    monkeypatch.setattr(_select, "_said", set())
    ran, run = [], _build._run
    monkeypatch.setattr(_build, "_run", lambda command: [ran.append(command), run(command)][1])
    _build.load.cache_clear()
    yield tmp_path / "offramp" / "kernels", ran
    _build.load.cache_clear()


def call():
    return head_stats(torch.ones(1, 2), torch.eye(2) * 3)


def compiled(ran):
    return sum("-o" in command for command in ran)


def test_once_for_all_processes(cache):
    folder, ran = cache
    assert call().first.item() == 3 and call().first.item() == 3 and compiled(ran) == 1
    assert len(list(folder.iterdir())) == 1  # and nothing half done beside it
    _build.load.cache_clear()  # as in another process
    assert call().first.item() == 3 and compiled(ran) == 1


def test_another_source_is_another_file(cache, monkeypatch):
    folder, ran = cache
    call()
    monkeypatch.setattr(_build, "FLAGS", (*_build.FLAGS, "-DANOTHER=1"))
    _build.load.cache_clear()
    call()
    assert compiled(ran) == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("broken", ["false", "folder"])
def test_what_does_not_compile_is_said(cache, monkeypatch, broken):
    folder, _ = cache
    if broken == "false":
        monkeypatch.setenv("CXX", "false")
    else:
        folder.parent.write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="head_stats: cpp is not used: .* could not compile or load it: .*torch runs"):
        assert call().first.item() == 3


def test_a_torch_without_that_interface_is_said(cache, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.warns(UserWarning, match=r"torch 2.9.1\+cpu is too old for it; write: pip install 'torch>=2.10'"):
        assert call().first.item() == 3


def test_a_recording_holds_the_call(cache):
    hidden, weight = torch.randn(2, 3), torch.randn(7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that shapes become constants
        step = torch.jit.trace(lambda x: head_stats(x, weight).logsumexp, hidden, check_trace=False)
    other = torch.randn(2, 3)
    torch.testing.assert_close(step(other), (other @ weight.t()).logsumexp(-1))


@pytest.mark.parametrize("damaged", [False, True])
def test_another_process(cache, damaged):
    folder, _ = cache
    call()
    (made,) = folder.iterdir()
    before = made.stat()
    if damaged:
        made.unlink()  # not written into: this process has it in its memory
        made.write_bytes(b"half of it")
    code = "import torch; from offramp.kernels import head_stats as h; one = torch.ones(1, 1); print(h(one, one).first)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert "tensor([1.])" in done.stdout and not done.stderr
    assert made.stat().st_size == before.st_size and (made.stat().st_mtime_ns != before.st_mtime_ns) == damaged
