"""Make `import torchvision` work where a CUDA build of it sits beside a CPU-only torch.

On some CPU machines the only torchvision to be had was built for CUDA. Its compiled operators do not load there, and
its Python part then registers fake kernels for operators nobody declared: "operator torchvision::nms does not exist".
timm and many transformers model classes import torchvision when it is installed, and fail with it. The cure is to
declare the two operator schemas first. Nothing computes them: our tests never run non-maximum suppression.

Run as a script, the file copies itself into site-packages, with a one-line `.pth` that imports it at start-up; it does
so only where torch is a CPU build and torchvision cannot be imported. Imported, it waits for the first
`import torchvision` and costs nothing before: torch is not loaded at start-up.
"""

import importlib.abc
import shutil
import sys
import sysconfig
from pathlib import Path

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds no module; the first search for torchvision is its cue to declare the operators."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def declare():
    """Declare the operators that nobody has declared yet; the library object must live as long as they do."""
    import torch

    torch._torchvision_cpu_ops = library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + SCHEMA)


def install():
    """Copy this file into site-packages if this environment needs it."""
    import torch

    if torch.version.cuda is not None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        site = Path(sysconfig.get_path("purelib"))
        here = Path(__file__)
        shutil.copy(here, site / here.name)
        (site / here.with_suffix(".pth").name).write_text(f"import {here.stem}\n")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, DeclareOperators())
