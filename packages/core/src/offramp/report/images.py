"""The contact sheet: images by the depth at which they left."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


def sheet(run: Mapping[str, Any]) -> str:
    """Return one figure per depth, shallow first; an image with a wrong answer is framed, and says what it was taken
    for.

    run: `images` is a list of {depth, name, count, right (share or None), shown: [{png (base64), title, right}]}.
    """
    groups = run.get("images") or []
    total = sum(one["count"] for one in groups) or 1
    parts = []
    for one in groups:
        said = f"{one['name']}: {one['count']:,} of {total:,} images ({one['count'] / total:.1%})"
        said += f", {one['right']:.1%} of them right" if one.get("right") is not None else ""
        cells = "".join(_image(shown) for shown in one["shown"])
        parts.append(f'<figure><figcaption>{escape(said)}</figcaption><div class="sheet">{cells}</div></figure>')
    note = "<p>Some of the images that left at each depth; a framed one has a wrong answer.</p>" if parts else ""
    return note + "".join(parts)


def _image(shown: Mapping[str, Any]) -> str:
    """Return one image; what is told in the frame's colour is in words too."""
    kind = "" if shown["right"] else ' class="wrong"'
    told = escape(str(shown["title"]), quote=True)
    return f'<img{kind} src="data:image/png;base64,{escape(shown["png"], quote=True)}" alt="{told}" title="{told}">'
