"""The report page: whole, self-contained, and safe to show whatever the model wrote."""

import copy
import re
from html.parser import HTMLParser

import pytest
import torch

from offramp import Calibration, Trace, calibrate, policy
from offramp.calibrator import Certificate
from offramp.cli import as_dict
from offramp.errors import DamagedFile
from offramp.report import html, read, sections, svg, write
from offramp.report.curves import POLICIES, summary
from offramp.report.page import FULL, NAMES, level_of
from offramp.report.words import explain, promise

VOID = {"meta", "wbr", "circle", "rect", "path", "polyline", "polygon"}


def trace(n=400, depths=(2, 4, 6, 8)):
    """Exits that are right as often as they are sure."""
    sure = torch.rand(n, len(depths)).sort(1).values
    right = torch.rand(n, len(depths)) < sure
    right[:, -1] = True
    stats = {"top1": sure, "margin": sure**2, "entropy": -sure.log(), "cosine": sure}
    return Trace(depths, stats, torch.where(right, 1, 0), classes=7)


def row(name, **more):
    body = {"tokens_per_second": 101.234, "speedup": 1.25, "speedup_quartiles": [1.1, 1.2, 1.3], "identical": True}
    body |= {"agreement": 1.0, "saved": 0.2, "accepted": 30, "drafted": 40, "tokens_per_round": 1.4, "bound": 1.3}
    return {"name": name, **body, "blocks_run": 800, "blocks_full": 1000, **more}


@pytest.fixture
def run():
    table = trace()
    chosen = calibrate(table, "confidence", alpha=0.1)
    tokens = [{"text": t, "depth": d} for t, d in (("<b>&", 2), ("\n", 4), ("end", 8))]
    return {
        "format": 1,
        "title": "A <run>",
        "rows": [row("generate"), row("verified"), row("calibrated", identical=False, saved=None)],
        "plain_rows": [row("generate"), row("assistant_early_exit", layer=4, drafted=None, bound=None)],
        **as_dict(chosen),
        "trace": summary(table, chosen),
        "exits": {"verified": {"2": 5, "8": 10}},
        "text": [{"name": "verified", "prompt": "</pre><script>", "tokens": tokens}],
        "machine": "2 cores",
        "date": "2026-01-01",
        "command": "offramp demo lm",
    }


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_section_is_there(run):
    page = html(run)
    found = [name for name, _, _ in sections(run)]
    assert found == ["text", "exits", "curves", "certificate", "speed"]  # a classifier's are in test_classify.py
    for name in found:
        assert f'<section id="{name}"><h2>{NAMES[name].format(unit="token")}</h2>' in page and f'href="#{name}"' in page


def test_the_page_is_whole(run):
    found = Reader(html(run))
    assert not found.open and found.tags.count("svg") > 2


def test_nothing_is_fetched_and_nothing_runs(run):
    page = html(run)
    found = Reader(page)
    assert not re.search(r"https?://|url\(|@import|javascript:", page)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert all(value.startswith("#") for name, value in found.attributes if name in ("src", "href", "xlink:href"))
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_what_the_model_wrote_is_escaped(run):
    page = html(run)
    assert "&lt;b&gt;&amp;</span>" in page and "&lt;/pre&gt;&lt;script&gt;" in page and "A &lt;run&gt;" in page


def test_tokens_say_their_depth_without_colour(run):
    page = html(run)
    assert 'title="decided at depth 2 of 8"' in page and 'title="decided by the full model (8 blocks)"' in page
    assert "2 of 3 tokens were decided before the last block" in page


def test_pictures_have_a_text_alternative(run):
    assert all("<title>" in part for part in html(run).split('<svg class="chart"')[1:])


def test_light_dark_and_phone(run):
    page = html(run)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page.count('<div class="scroll"') == page.count("<table>") == 3


def test_speed_table_tells_what_was_measured(run):
    page = html(run)
    assert "101.2" in page and "1.25×" in page and "✗ no" in page and "30 / 40" in page and "800 / 1,000" in page
    assert "(layer 4)" in page


def test_a_part_that_is_missing_is_left_out(run):
    only = {"format": 1, "rows": run["rows"]}
    assert [name for name, _, _ in sections(only)] == ["speed"]
    Reader(html(only))


@pytest.mark.parametrize("key", ["text", "exits", "trace", "rows", "plain_rows", "policy", "title", "machine"])
def test_no_part_needs_another(run, key):
    less = copy.deepcopy(run)
    del less[key]
    Reader(html(less))


def test_exits_of_one_way_need_no_name(run):
    assert "10 (66.7%)" in html({**run, "exits": {"2": 5, "8": 10}})


def test_uncertified_says_why(run):
    page = html({**run, "certificate": None, "note": "uncertified: too few rows & more"})
    assert "Uncertified, so nothing is promised: too few rows &amp; more" in page
    assert "not calibrated" in promise(None)


@pytest.mark.parametrize("risk", ["disagreement", "accuracy_drop", "excess_loss", "another"])
def test_the_promise_names_its_numbers(risk):
    made = Certificate(risk, 0.05, 0.1, 1056, 0.012, "binomial", (1.0, 0.5), "abc", "def")
    body = as_dict(Calibration(policy("confidence", threshold=0.5), made))["certificate"]
    said = promise(body)
    assert "90 % confidence" in said and "1,056" in said and ("0.05" in said or "5 %" in said)
    assert {name for name, _, _ in explain(body)} == set(body)


def test_curves_cover_the_policies():
    found = summary(trace())["curves"]
    assert set(found) == set(POLICIES)
    for points in found.values():
        depths = [p["depth_mean"] for p in points]
        assert depths == sorted(depths) and all(0 <= p["agreement"] <= 1 for p in points)
    assert {p["setting"]["depth"] for p in found["fixed"]} == {2, 4, 6}


def test_a_policy_that_does_not_fit_has_no_curve():
    assert "patience" not in summary(trace(depths=(2, 8)))["curves"]


def test_tints_run_from_the_first_exit_to_the_full_model():
    assert [level_of(d, [2, 4, 6, 8]) for d in (2, 4, 6, 8)] == [0, 2, 4, FULL]
    assert [level_of(d, [3, 12]) for d in (3, 12)] == [0, FULL]


@pytest.mark.parametrize(("low", "high"), [(0.3, 1.0), (3, 12), (0, 0.02), (2, 2)])
def test_ticks_are_few_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 9 and all(low <= t <= high + 1e-9 for t in found)


def test_write_and_read(run, tmp_path):
    from offramp.cli import dump_json

    (tmp_path / "run.json").write_text(dump_json(run))
    write(read(tmp_path / "run.json"), tmp_path / "run.html")
    assert (tmp_path / "run.html").read_text() == html(read(tmp_path / "run.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("{}", "no format"), ('{"format": 1}', "nothing to report"), ('{"format": 9}', "reads up to")],
)
def test_a_file_that_is_no_run_is_refused(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DamagedFile, match=message):
        read(tmp_path / "run.json")
