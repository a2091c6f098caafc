"""Data sets of images: folders, pairs and arrow rows become batches, each image as the model's own weights want it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from offramp.errors import BadArgument
from offramp.record import check_size
from offramp_vision.backbones._images import IMAGES, LABELS, noise

#: names of columns, after which kinds of columns decide (`datasets` knows them)
COLUMNS = {"Image": ("image", "img", *IMAGES), "ClassLabel": ("label", *LABELS)}
#: how Pillow calls an image of so many channels
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Pictures:
    """A map-style data set of (image, label) pairs or of rows with an image column, as tensors that the model takes.

    Pillow images are resized, cropped and normalised as `timm.data.create_transform` has it for the model; tensors of
    floats [channel, height, width] are taken as they are. Raises `BadArgument` for rows without an image, for labels
    that the model has no class for, and for a set with another number of classes.
    """

    def __init__(self, rows: Any, model: nn.Module, classes: int) -> None:
        self.rows, self.classes = rows, classes
        self.transform, self.mode = preprocessing(model)
        names = classes_of(rows)
        if names is not None and len(names) != classes:
            raise BadArgument(
                f"the data has {len(names)} classes ({', '.join(map(str, names[:3]))}, ...) and the model answers with "
                f"{classes}; build it with timm.create_model(name, num_classes={len(names)}, ...)"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        """Return an image [channel, height, width] and its label, or None where it has none."""
        image, label = cells(self.rows[index], getattr(self.rows, "features", None))
        if not isinstance(image, Tensor):
            if not hasattr(image, "convert"):
                raise BadArgument(
                    f"row {index} holds a {type(image).__name__} where an image should be; rows are (image, label) or "
                    f"have a column {' or '.join(map(repr, COLUMNS['Image']))}, images are Pillow's or tensors"
                )
            image = self.transform(image.convert(self.mode))
        if image.dim() != 3 or not image.is_floating_point():
            raise BadArgument(
                f"row {index} is a tensor {image.dtype} of shape {list(image.shape)}; one image is floats [channel, "
                "height, width], normalised: leave images as Pillow's, and they are preprocessed for the model"
            )
        if label is None:
            return image, None
        label = int(label)
        if not 0 <= label < self.classes:
            raise BadArgument(f"row {index} has label {label}, and the model has classes 0 to {self.classes - 1}")
        return image, label


def loader(rows: Any, model: nn.Module, classes: int, size: int, seed: int | None = None) -> DataLoader[Any]:
    """Return batches {"x", "labels"} of `size` images, to be gone through again and again.

    seed: of the order, another one each time round; None for the order of the data.
    """
    check_size(size)
    generator = torch.Generator().manual_seed(seed or 0)  # one of its own: without it, the global one would move
    pictures: Any = Pictures(rows, model, classes)
    return DataLoader(pictures, size, shuffle=seed is not None, generator=generator, collate_fn=collate)


def collate(rows: Sequence[tuple[Tensor, int | None]]) -> dict[str, Tensor]:
    """Return one batch; raises `BadArgument` for images of different sizes, or where only some have a label."""
    sizes, known = {tuple(image.shape) for image, _ in rows}, [label for _, label in rows if label is not None]
    if len(sizes) > 1:
        raise BadArgument(f"images of one batch have sizes {sorted(sizes)}; give Pillow images, or tensors of one size")
    if known and len(known) < len(rows):
        raise BadArgument(f"{len(rows) - len(known)} of {len(rows)} images of a batch have no label; label all or none")
    images = torch.stack([image for image, _ in rows])
    return {"x": images, "labels": torch.tensor(known)} if known else {"x": images}


def is_rows(data: Any) -> bool:
    """Return whether data is a map-style data set: rows by number, and neither a tensor nor batches."""
    plain = isinstance(data, (Tensor, Mapping, list, tuple, str, Iterator))
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def splits_of(data: Any) -> list[str]:
    """Return the names of the parts of a data set that comes in parts (train, test); none for any other data."""
    parts = data if isinstance(data, Mapping) else {}
    return [str(name) for name, part in parts.items() if is_rows(part)]


def cells(row: Any, features: Any = None) -> tuple[Any, Any]:
    """Return image and label (or None) of a row. features: kinds of its columns by name, where it is known."""
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return row[0], row[1]
    if not isinstance(row, Mapping):
        return row, None
    found = []
    for kind, names in COLUMNS.items():
        alike = [n for n, f in (features or {}).items() if type(f).__name__ == kind]
        found.append(next((row[n] for n in (*names, *alike) if n in row), None))
    return found[0], found[1]


def classes_of(rows: Any) -> list[Any] | None:
    """Return the names of the classes of a data set, in order; None where it does not say."""
    named = getattr(rows, "classes", None)
    if named is None:
        features = getattr(rows, "features", None) or {}
        columns = [*(n for n in COLUMNS["ClassLabel"] if n in features), *features]
        named = next((names for n in columns if (names := getattr(features[n], "names", None))), None)
    return list(named) if named is not None else None


def preprocessing(model: nn.Module) -> tuple[Callable[[Any], Tensor], str]:
    """Return the model's own transform of Pillow images, as its weights were evaluated with, and their mode."""
    _need_torchvision()
    from timm.data import create_transform, resolve_model_data_config

    shape = tuple(noise(model, 1).shape[1:])  # of a model built for another size than its weights' config says
    config = resolve_model_data_config(model, {"input_size": shape})
    for key in ("mean", "std"):  # a config of three colours, a model of one channel
        config[key] = config[key] if len(config[key]) == shape[0] else (sum(config[key]) / len(config[key]),) * shape[0]
    if shape[0] not in MODES:
        raise BadArgument(f"the model takes {shape[0]} channels, which no image file has; give tensors of floats")
    transform: Callable[[Any], Tensor] = create_transform(**config, is_training=False)
    return transform, MODES[shape[0]]


def folder(path: Path) -> Any:
    """Return the images under `path`, one folder per class; raises `BadArgument` where there are none."""
    _need_torchvision()
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadArgument(
            f"{path} holds no folders of images: put each class's images into a folder of its name, "
            f"e.g. {path}/cat/1.png ({error})"
        ) from error


def _need_torchvision() -> None:
    """Raise `BadArgument` with the line to run where torchvision is missing, or built for another torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # one for another torch lacks operators: a RuntimeError
        raise BadArgument(
            f"images are read by torchvision, and importing it failed ({error}); install the one for torch "
            f"{torch.__version__}: pip install --force-reinstall torchvision"
        ) from error
