"""`import offramp` costs little beyond `import torch`, and loads no framework and no tool that a model run can miss."""

import json
import subprocess
import sys

BUDGET = 0.1  # seconds beyond `import torch`
TRIES = 5
NEVER = {"transformers", "diffusers", "timm", "peft", "accelerate", "torchvision", "scipy", "typer", "rich", "sklearn"}

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def probe(statement):
    """Seconds that a statement takes in a fresh process that has torch, and the modules it loads."""
    child = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def best(statement):
    """The best of a few tries; the first within the budget settles it, since others can only be better."""
    seconds = float("inf")
    for _ in range(TRIES):
        seconds = min(seconds, probe(statement)[0])
        if seconds < BUDGET:
            break
    return seconds


def intruders(statement):
    """The top-level packages a statement loads that it should not."""
    return {name.split(".")[0] for name in probe(statement)[1]} & NEVER


def test_import_is_cheap():
    assert best("import offramp") < BUDGET


def test_import_loads_nothing_heavy():
    assert not intruders("import offramp")


def test_both_checks_can_fail():
    assert intruders("import scipy, typer") >= {"scipy", "typer"}
    assert best(f"time.sleep({BUDGET})") >= BUDGET
