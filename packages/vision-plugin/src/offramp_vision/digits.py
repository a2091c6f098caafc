"""Real images that need no download: handwritten digits of scikit-learn, and digits printed in this machine's fonts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import BadArgument

CLASSES, SIDE = 10, 32
#: levels of grey in scikit-learn's digits
WHITE = 16.0
#: where systems keep fonts; matplotlib, where it is installed, brings some too
FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts"),
)


class Digits(NamedTuple):
    """Images [n, 1, 32, 32] from -1 to 1 in random order, labels [n], and in words where they come from."""

    images: Tensor
    labels: Tensor
    source: str


def load(seed: int = 0, fonts: bool = True) -> Digits:
    """Return all digits, written and, where there are fonts, printed; raises `BadArgument` without scikit-learn."""
    written, labels = handwritten()
    source = f"{len(written):,} handwritten digits (scikit-learn, 8 x 8 enlarged to {SIDE} x {SIDE})"
    shown, named = printed() if fonts else (written[:0], labels[:0])
    if len(shown):
        source += f" and {len(shown):,} printed ones ({len(shown) // CLASSES} fonts of this machine)"
    images, labels = torch.cat([written, shown]), torch.cat([labels, named])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Digits(images[order], labels[order], source)


@cache
def handwritten() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, enlarged: images [1797, 1, 32, 32] from -1 to 1, labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadArgument("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    small = torch.tensor(found.images, dtype=torch.float32)[:, None] / WHITE * 2 - 1
    images = functional.interpolate(small, size=SIDE, mode="bilinear", align_corners=False)
    return images, torch.tensor(found.target, dtype=torch.long)


@cache
def printed() -> tuple[Tensor, Tensor]:
    """Return the ten digits in every font found: images [10 n, 1, 32, 32] from -1 to 1, labels; none without fonts."""
    sheets = [[_glyph(path, str(digit)) for digit in range(CLASSES)] for path in fonts()]
    whole = [torch.stack(s) for s in sheets if all(g is not None for g in s)]  # type: ignore[arg-type]
    if not whole:
        return torch.empty(0, 1, SIDE, SIDE), torch.empty(0, dtype=torch.long)
    every = torch.stack(whole)  # [font, digit, row, column]
    # a font of symbols draws something else under the codes of digits: less than half are nearest to their own mean
    nearest = torch.cdist(every.flatten(2), every.mean(0).flatten(1)[None]).argmin(-1)
    every = every[(nearest == torch.arange(CLASSES)).sum(-1) * 2 > CLASSES]
    return every.flatten(0, 1)[:, None], torch.arange(CLASSES).repeat(len(every))


def fonts() -> Iterator[Path]:
    """Yield the font files of this machine, each name once, in order of their names."""
    folders = [Path(folder).expanduser() for folder in FOLDERS]
    spec = find_spec("matplotlib")
    folders += [Path(place) / "mpl-data" / "fonts" for place in (spec and spec.submodule_search_locations) or ()]
    found = {path.name: path for folder in folders for path in folder.rglob("*") if path.suffix in (".ttf", ".otf")}
    yield from (found[name] for name in sorted(found))


def _glyph(path: Path, text: str) -> Tensor | None:
    """Return one character, as large as the picture allows, [32, 32] from -1 to 1; None where the font has none."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        font: Any = ImageFont.truetype(str(path), SIDE)
        left, top, right, bottom = font.getbbox(text)
    except OSError:  # no font that can be read, e.g. one of bitmaps
        return None
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    scale = (SIDE - 6) / max(image.size)  # three pixels of margin, as the written ones have on average
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIDE, SIDE).float() / 127.5 - 1
