"""`import offramp` costs little beyond `import torch`, and loads no framework and no tool that a model run can miss."""

import json
import subprocess
import sys

BUDGET = 0.1  # of what `import torch` costs, in processor time: the same on slow and on busy machines
TRIES = 5
NEVER = {"transformers", "diffusers", "timm", "peft", "accelerate", "torchvision", "scipy", "typer", "rich", "sklearn"}

PROBE = """
import json, sys, time
import torch
torch_seconds = time.process_time()
before = set(sys.modules)
{statement}
share = time.process_time() / torch_seconds - 1
print(json.dumps([share, sorted(set(sys.modules) - before)]))
"""


def probe(statement):
    """What a statement costs in a fresh process, over what `import torch` did, and the modules it loads."""
    child = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def best(statement):
    """The best of a few tries; the first within the budget settles it, since others can only be better."""
    share = float("inf")
    for _ in range(TRIES):
        share = min(share, probe(statement)[0])
        if share < BUDGET:
            break
    return share


def intruders(statement):
    """The top-level packages a statement loads that it should not."""
    return {name.split(".")[0] for name in probe(statement)[1]} & NEVER


def test_import_is_cheap():
    assert best("import offramp") < BUDGET


def test_import_loads_nothing_heavy():
    assert not intruders("import offramp")


def test_both_checks_can_fail():
    assert intruders("import scipy, typer") >= {"scipy", "typer"}
    assert best(f"while time.process_time() < {1 + BUDGET} * torch_seconds: pass") >= BUDGET
