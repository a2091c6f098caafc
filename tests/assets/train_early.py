"""Continue a testbed model with the `layerskip` loss until its early layers say what its last one says.

python tests/assets/train_early.py IN_DIR OUT_DIR STEPS LR PULL SEED   (CPU, float32, one thread, 2 to 4 s per step)
Trained on the sources and documentation of the running Python's standard library, less the texts of
pycode-5m/heldout.txt; writes config, tokenizer, bf16 safetensors and train.log. The weights of pycode-5m-early ran on
Python 3.11.7's library, twice: pycode-5m-layerskip 1900 1e-3 0.3 2, and from its result 330 6e-4 0.7 3. On all of
heldout.txt, in windows of 256, pycode-5m has a cross-entropy of 2.607 nats, pycode-5m-layerskip of 2.609, and
pycode-5m-early of 2.611, and its exit at 4 agrees on 60.7 % of the tokens (42.9 % before). Files differ: on the first
38 windows, 2.410, 2.405 and 2.386. The first and the last line of a run in train.log are on all, those between on
20,000 tokens.
"""

import glob
import json
import pydoc_data.topics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import offramp
from offramp.attach import find
from offramp.enable import paused

SKIP = ("/site-packages/", "/test/", "/tests/", "/idlelib/", "/lib2to3/", "/encodings/", "/turtledemo/", "pydoc_data")
BATCH, LENGTH, AT, LOOK = 16, 256, (2, 3, 4, 6, 8), 100
LOSS = {"loss": "layerskip", "curriculum": "rotational", "rotation": 2, "weighting": "inverse", "e_scale": 4.0}
LOSS |= {"own": 0.7}
HELDOUT = Path(__file__).parent / "pycode-5m" / "heldout.txt"


def corpus() -> list[str]:
    """Return every training text: none of the held-out ones."""
    root = sysconfig.get_paths()["stdlib"]
    files = [f for f in sorted(glob.glob(root + "/**/*.py", recursive=True)) if not any(s in f for s in SKIP)]
    texts = [Path(f).read_text(encoding="utf8", errors="ignore") for f in files] + list(
        pydoc_data.topics.topics.values()
    )
    held = set(HELDOUT.read_text(encoding="utf8").split("\n\f\n"))
    return [text for text in texts if text not in held]


@torch.no_grad()
def held_out(model: torch.nn.Module, ids: Tensor) -> dict[str, float]:
    """Return cross-entropy on windows of 256 and, by depth, how often an exit agrees with the last layer."""
    exits, was = find(model), model.training
    model.eval()
    loss, rows, hits = 0.0, 0, dict.fromkeys(AT, 0)
    with paused(model):
        for part in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).split(16):
            seen = exits.backbone.observe({"input_ids": part, "labels": part}, AT)
            final = exits.backbone.context().readout(seen.final)
            loss += float(torch.nn.functional.cross_entropy(final, seen.targets, reduction="sum"))
            rows += len(final)
            for d, hidden in zip(AT, seen.hidden, strict=True):
                hits[d] += int((exits[d](hidden).argmax(-1) == final.argmax(-1)).sum())
    model.train(was)
    return {"cross_entropy": loss / rows, **{f"agreement_{d}": n / rows for d, n in hits.items()}}


def main(source: Path, out: Path, steps: int, lr: float, pull: float, seed: int) -> None:
    """Train and write."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    loss = {**LOSS, "pull": pull}
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([i for text in corpus() for i in [0, *tokenizer(text, verbose=False)["input_ids"]]])
    held = tokenizer(HELDOUT.read_text(encoding="utf8"), return_tensors="pt", verbose=False).input_ids[0]
    out.mkdir(parents=True, exist_ok=True)
    started, log = time.time(), open(out / "train.log", "w", encoding="utf8")

    def say(step: int, ids: Tensor) -> None:
        line = {"step": step, "seconds": round(time.time() - started), **held_out(model, ids)}
        print(json.dumps({k: round(v, 4) for k, v in line.items()}), file=log, flush=True)

    class Data:
        """Random windows, endlessly; says every LOOK steps how far the model is."""

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            step = 0
            while True:
                if step and step % LOOK == 0:
                    say(step, held[:20000])
                rows = torch.stack([ids[j : j + LENGTH] for j in torch.randint(0, len(ids) - LENGTH, (BATCH,))])
                yield {"input_ids": rows, "labels": rows}
                step += 1

    with offramp.attach(model, AT, "shared"):
        run = {"source": source.name, "steps": steps, "batch": BATCH, "length": LENGTH, "lr": lr, "seed": seed}
        print(json.dumps({**run, **loss}), file=log)
        say(0, held)
        offramp.fit(model, Data(), steps=steps, lr=lr, backbone=True, layer_dropout=0.1, weight_decay=0.05, **loss)
        say(steps, held)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    source, out, steps, lr, pull, seed = sys.argv[1:]
    main(Path(source), Path(out), int(steps), float(lr), float(pull), int(seed))
