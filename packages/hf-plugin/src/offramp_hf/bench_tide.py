"""The other installable early-exit package, `tide-inference` (arXiv 2603.21365), as one way to generate."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.checkpoint import write_text
from offramp.errors import DamagedFile
from offramp_hf.measure import Generate

#: the name that `tide-inference` is imported by, and characters per calibration text (it drops those up to 100)
MODULE, PIECE = "TIDE", 512


@dataclass
class Tide(Generate):
    """Generates through the package's own engine; which blocks really ran is counted by hooks, as for every way that
    offramp does not drive.
    """

    engine: Any = None

    @property
    def foreign(self) -> bool:
        """Offramp does not count in it."""
        return True

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the ids [batch, prompt + new]; temperature 0 is the package's word for greedy."""
        sampling = {"temperature": self.sample or 0.0, "top_k": 0, "top_p": 1.0}
        found: Tensor = self.engine.generate(ids, max_new_tokens=self.new_tokens, **sampling)
        return found


def installed() -> bool:
    """Whether `import TIDE` would find the package."""
    return importlib.util.find_spec(MODULE) is not None


def tide(model: Any, tokenizer: Any, text: str, folder: Path, new_tokens: int, sample: float | None) -> Tide:
    """Train the package's routers on `text` as it documents, and return the way; its files go into `folder`.

    Its defaults, a router every 4th block and none before the 8th, are meant for 32 blocks and are scaled to this
    model. Raises `DamagedFile` where it could not read the text: it would go on with made-up sentences.
    """
    import TIDE
    from datasets import load_dataset

    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    write_text(folder / "text" / "train.jsonl", "\n".join(json.dumps({"text": piece}) for piece in pieces))
    source = str(folder / "text")
    try:
        next(iter(load_dataset(source, split="train", streaming=True)))
    except Exception as error:  # the package reads with the same call and swallows whatever it raises
        raise DamagedFile(
            f"datasets cannot read {source}, so tide-inference has nothing to train on: {error}"
        ) from error
    depth = model.config.get_text_config().num_hidden_layers
    every, least = max(1, round(depth / 8)), depth // 4
    config = TIDE.TIDEConfig(checkpoint_interval=every, min_layers=least, calibration_dataset=source)
    # its hooks stay on the model that it is given, and what is hooked runs from no recording: it gets another, which
    # shares the weights
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    router = folder / "router.pt"
    TIDE.calibrate(model, tokenizer, config=config, save_path=str(router))
    engine = TIDE.TIDE(model, router_path=str(router), config=config)
    return Tide("tide-inference", model, new_tokens, sample=sample, engine=engine)
