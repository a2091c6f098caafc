"""What every test gets: no hub, and the same random numbers each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any framework is imported: they read it once

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # read when triton is first imported, whoever does it
    os.environ.setdefault("TRITON_INTERPRET", "1")

# one thread: on the tests' tiny tensors two threads wait for one another, 4 to 6 times slower on a busy machine
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Each test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)
