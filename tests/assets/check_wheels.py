"""Install each wheel alone with core into a bare folder, import it, and check that exactly its own plugin is found.

    python tests/assets/check_wheels.py dist

The environment that runs this holds the four packages as editable installs; neither their code nor their entry points
may answer for the wheels. So the child runs with `-I -S` (no site-packages, no `.pth`) and sees two folders only: the
target, and a folder of links to everything in site-packages that is not ours.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

CORE = "offramp_core"
PLUGINS = {
    "offramp_hf": "hf",
    "offramp_diffusers": "diffusers",
    "offramp_vision": "vision",
}
OURS = re.compile(r"(__editable__|_editable_impl_)?_*offramp", re.IGNORECASE)
FRAMEWORKS = ("transformers", "diffusers", "timm", "peft", "torchvision", "accelerate")

CHILD = """
import importlib, sys
target, third_party, package, plugin, *frameworks = sys.argv[1:]
sys.path[:0] = [target, third_party]
names = ["offramp"] + [package] * (package != "offramp")
for module in map(importlib.import_module, names):
    assert module.__file__.startswith(target), f"{module.__name__} came from {module.__file__}, not from the wheel"
from offramp._plugins import plugins
report = plugins()
wanted = [plugin] if plugin else []
assert not report.broken, f"broken plugins: {report.broken}"
assert sorted(report.loaded) == wanted, f"found plugins {sorted(report.loaded)}, wanted {wanted}"
assert not plugin or report.loaded[plugin].__file__.startswith(target), report.loaded[plugin].__file__
loaded = sorted(set(sys.modules) & set(frameworks))
assert not loaded, f"finding the plugins imported {loaded}"
import offramp
print(offramp.__version__, "plugins:", ", ".join(sorted(report.loaded)) or "none")
"""


def find(dist, name):
    """The one wheel of a distribution."""
    wheels = sorted(dist.glob(f"{name}-*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"expected one wheel {name}-*.whl in {dist}, found {[w.name for w in wheels] or 'none'}")
    return wheels[0]


def check_contents(wheel, package):
    """Typed, licensed, and nothing but its own package inside."""
    inside = zipfile.ZipFile(wheel).namelist()
    missing = [end for end in (f"{package}/py.typed", "licenses/LICENSE") if not any(n.endswith(end) for n in inside)]
    strangers = {n.split("/")[0] for n in inside if not n.split("/")[0].endswith(".dist-info")} - {package}
    if missing or strangers:
        raise SystemExit(f"{wheel.name}: missing {missing}, unexpected {sorted(strangers)}")


def link_third_party(folder):
    """Links to everything in site-packages but our own editable installs."""
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not OURS.match(entry.name) and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)


def check(wheels, package, plugin, third_party):
    """Install the wheels into a bare target and look at them from a process that sees nothing else of ours."""
    with tempfile.TemporaryDirectory() as target:
        target = os.path.realpath(target)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
        subprocess.run([*pip, *map(str, wheels)], check=True)
        child = [sys.executable, "-I", "-S", "-c", CHILD, target, str(third_party), package, plugin, *FRAMEWORKS]
        done = subprocess.run(child, capture_output=True, text=True)
    names = " + ".join(w.name for w in wheels)
    if done.returncode:
        raise SystemExit(f"{names}: failed\n{done.stdout}{done.stderr}")
    sys.stdout.write(f"{names}: {done.stdout}")


def main(dist):
    """Core alone, then each plugin with core."""
    core = find(dist, CORE)
    check_contents(core, "offramp")
    with tempfile.TemporaryDirectory() as third_party:
        link_third_party(Path(third_party))
        check([core], "offramp", "", third_party)
        for package, plugin in PLUGINS.items():
            wheel = find(dist, package)
            check_contents(wheel, package)
            check([core, wheel], package, plugin, third_party)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
