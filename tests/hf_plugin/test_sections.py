"""Package descriptions: what is taken from a package index, and the kept sample."""

import subprocess
from pathlib import Path

import pytest

from offramp.errors import BadArgument
from offramp_hf import sections

ASSET = Path(__file__).parents[1] / "assets" / "debian_sections"
DUMP = """Package: zlib1g
Source: zlib (1:1.2.13)
Description: compression library
Tag: role::shared-lib,
 devel::library
Section: libs

Package: zlib1g-dev
Source: zlib
Description: compression library - development
Section: libdevel

Package: unrar
Description: Unarchiver for .rar files
Section: non-free/utils

Package: other
Description: compression library
Section: libs

Package: nothing
Section: libs

Package: abe
Description: side-scrolling game: "Abe's"
Section: games
"""


def test_one_package_per_source_of_main_and_no_text_twice():
    found = list(sections.parse(DUMP))
    assert [p.name for p in found] == ["zlib1g", "abe"]
    assert found[1] == ("abe", "games", 'side-scrolling game: "Abe\'s"')


def test_the_sample_is_small_whole_and_says_where_it_is_from():
    packages = sections.read(ASSET / "sample.tsv")
    names, kept = sections.largest(packages)
    assert len(packages) == len(kept) == 3000 and len(names) == sections.SECTIONS
    assert len({p.name for p in packages}) == len({p.text for p in packages}) == 3000
    assert (ASSET / "sample.tsv").stat().st_size < 2_000_000
    assert "licence" in (ASSET / "README.md").read_text()


def test_rows_are_shuffled_the_same_way_each_time_and_labels_are_theirs():
    one, two = sections.load(200, index=False), sections.load(200, index=False)
    assert one.texts == two.texts and one.labels.tolist() == two.labels.tolist()
    by_text = {p.text: p.section for p in sections.read(ASSET / "sample.tsv")}
    assert [one.names[k] for k in one.labels.tolist()] == [by_text[t] for t in one.texts]
    assert len(set(one.labels.tolist())) > 10 and "sample" in one.source


def test_a_machine_without_an_index_takes_the_sample(monkeypatch):
    monkeypatch.setattr(sections.shutil, "which", lambda name: None)
    assert len(sections.load().texts) == 3000


def test_an_index_is_used_where_it_is_large_enough(monkeypatch):
    monkeypatch.setattr(sections.shutil, "which", lambda name: "/usr/bin/apt-cache")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=DUMP))
    monkeypatch.setattr(sections, "ENOUGH", 2)
    found = sections.load()
    assert sorted(found.names) == ["games", "libs"] and "index of this machine" in found.source
    monkeypatch.setattr(sections, "ENOUGH", 3)
    assert "sample" in sections.load().source


def test_more_rows_than_there_are():
    with pytest.raises(BadArgument, match="4000 rows were asked for, and the sample .* holds 3000"):
        sections.load(4000, index=False)


def test_a_line_that_is_no_package_is_named(tmp_path):
    (tmp_path / "bad.tsv").write_text("a\tgames\ttext\nb\tgames\n")
    with pytest.raises(BadArgument, match="line 2: expected name, section and description"):
        sections.read(tmp_path / "bad.tsv")
