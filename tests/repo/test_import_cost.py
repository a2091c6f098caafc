"""`import offramp` costs little beyond `import torch`: few modules, no framework and no tool that a model run can miss.

Seconds are not asked for: the same import takes 0.05 s on one machine and 0.2 s on another that is busy.
"""

import json
import subprocess
import sys

#: what may be loaded beyond torch and the standard library, and how many modules of offramp itself
ALLOWED, MOST = {"offramp", "pluggy", "safetensors"}, 50

PROBE = """
import json, sys
import torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded(statement):
    """The modules that a statement loads in a fresh process that has torch, without the standard library's."""
    child = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return [name for name in json.loads(done.stdout) if name.split(".")[0] not in sys.stdlib_module_names]


def packages(modules):
    return {name.split(".")[0] for name in modules}


def own(modules):
    return sum(name.split(".")[0] == "offramp" for name in modules)


def test_import_is_cheap():
    modules = loaded("import offramp")
    assert packages(modules) <= ALLOWED and own(modules) <= MOST


def test_both_checks_can_fail():
    assert packages(loaded("import scipy, typer")) >= {"scipy", "typer"}
    assert own(loaded("import offramp.cli, offramp.testing.policies, offramp.testing.gates")) > MOST
