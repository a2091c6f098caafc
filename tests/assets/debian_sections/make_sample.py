"""Write sample.tsv: 3,000 packages of the 20 largest sections, drawn from `apt-cache dumpavail` of a Debian machine."""

from pathlib import Path

import torch

from offramp_hf.sections import from_index, largest

ROWS, SEED = 3000, 0


def main() -> None:
    _, packages = largest(from_index())
    drawn = torch.randperm(len(packages), generator=torch.Generator().manual_seed(SEED))[:ROWS].sort().values
    lines = ["\t".join(field.replace("\t", " ") for field in packages[i]) for i in drawn.tolist()]
    Path(__file__).with_name("sample.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
