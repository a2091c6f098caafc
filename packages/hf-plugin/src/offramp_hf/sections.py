"""Debian package descriptions and the section each package is filed under: real text to classify, no download."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from offramp.errors import BadArgument

#: where the kept sample lies in a checkout, and the classes: the largest sections
SAMPLE, SECTIONS = Path("tests") / "assets" / "debian_sections" / "sample.tsv", 20
#: fewer packages than this in the index of a machine, and the sample is the better data
ENOUGH = 10_000


class Package(NamedTuple):
    """One package: its name, section and one-line description."""

    name: str
    section: str
    text: str


class Sections(NamedTuple):
    """Texts with labels [rows] in random order; names of the classes by label; where they come from, in words."""

    texts: list[str]
    labels: torch.Tensor
    names: tuple[str, ...]
    source: str


def load(rows: int | None = None, index: bool = True, seed: int = 0) -> Sections:
    """Return descriptions with their sections: from the machine's package index if it has one, else from the sample.

    rows: at most so many, None for all; index: False takes the sample in any case. Raises `BadArgument` when there is
    neither, or fewer rows than asked for.
    """
    packages, source = list(from_index()) if index else [], "the package index of this machine (apt-cache dumpavail)"
    if len(packages) < ENOUGH:
        path = find_sample()
        packages, source = read(path), f"the sample {SAMPLE.as_posix()}"
    names, kept = largest(packages)
    if rows is not None and rows > len(kept):
        raise BadArgument(f"{rows} rows were asked for, and {source} holds {len(kept)}; ask for at most that many")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    labels = torch.tensor([names.index(kept[i].section) for i in order], dtype=torch.long)
    return Sections([kept[i].text for i in order], labels, names, source)


def largest(packages: Iterable[Package], count: int = SECTIONS) -> tuple[tuple[str, ...], list[Package]]:
    """Return the names of the `count` largest sections, the largest first, and the packages in them."""
    found = list(packages)
    sizes = Counter(p.section for p in found)
    names = tuple(sorted(sizes, key=lambda s: (-sizes[s], s))[:count])
    return names, [p for p in found if p.section in names]


def from_index() -> Iterator[Package]:
    """Yield the packages that `apt-cache dumpavail` knows, none where there is no apt-cache."""
    if shutil.which("apt-cache") is None:
        return
    found = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, errors="replace", check=False)
    yield from parse(found.stdout)


def parse(dump: str) -> Iterator[Package]:
    """Yield one package per source package, of the area `main`: packages built from one source resemble each other, and
    a certificate wants rows that are independent. Descriptions that were seen before are left out too.
    """
    sources, texts = set(), set()
    for stanza in dump.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        name, section, text = (fields.get(key, "").strip() for key in ("Package", "Section", "Description"))
        source = fields.get("Source", name).split(" ")[0]
        if not (name and section and text) or "/" in section or source in sources or text in texts:
            continue
        sources.add(source)
        texts.add(text)
        yield Package(name, section, text)


def find_sample() -> Path:
    """Return the kept sample, looked for upwards from here and from the source; raises `BadArgument`."""
    for place in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents):
        if (place / SAMPLE).is_file():
            return place / SAMPLE
    raise BadArgument(
        f"this machine has no package index (apt-cache dumpavail), and {SAMPLE.as_posix()} was not found above "
        f"{Path.cwd()}; run this in a checkout of offramp"
    )


def read(path: Path) -> list[Package]:
    """Return the packages of a sample: lines of name, section and description with tabs between them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if bad := [i + 1 for i, row in enumerate(rows) if len(row) != len(Package._fields)]:
        raise BadArgument(f"{path}, line {bad[0]}: expected name, section and description with tabs between them")
    return [Package(*row) for row in rows]
