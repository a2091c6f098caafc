"""The contact sheet, and a page of several runs."""

import re

from offramp.report import html, sections
from offramp.report.images import sheet

PNG = "iVBORw0KGgo="


def run(**more):
    shown = [{"png": PNG, "title": "a 3", "right": True}, {"png": PNG, "title": 'a "5" taken for 3', "right": False}]
    groups = [
        {"depth": 1, "name": "depth 1", "count": 30, "right": 0.9, "shown": shown},
        {"depth": 4, "name": "full model", "count": 10, "right": None, "shown": shown[:1]},
    ]
    return {"images": groups, "unit": "image", **more}


def test_every_depth_has_its_images_and_wrong_ones_are_framed():
    made = sheet(run())
    assert made.count("<figure>") == 2 and made.count("<img") == 3 and made.count('class="wrong"') == 1
    assert "depth 1: 30 of 40 images (75.0%), 90.0% of them right" in made
    assert "full model: 10 of 40 images (25.0%)<" in made
    assert 'alt="a &quot;5&quot; taken for 3"' in made and sheet({}) == ""


def test_runs_of_a_page_have_sections_of_their_own():
    parts = {"exits": {"1": 30, "4": 10}, "depths": [1, 4]}
    body = {"title": "two", "runs": [run(name="ViT", **parts), run(name="CNN", **parts)]}
    found = [(name, heading) for name, heading, _ in sections(body)]
    assert [n for n, _ in found] == ["ViT-exits", "ViT-images", "CNN-exits", "CNN-images"]
    assert found[0][1] == "ViT: where images were decided"
    page = html(body)
    links = re.findall(r'<a href="#([^"]+)">', page)
    assert links == [n for n, _ in found] and all(f'<section id="{n}">' in page for n in links)
