"""What of the drafts stands: chains and trees against a walk in plain Python, sampling against its distribution."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.verify import draw, verify

SHAPES = [
    (0, 3), (1, 0), (1, 1), (2, 1), (3, 2), (1, 7), (5, 3), (4, 4), (7, 5), (8, 6), (9, 1), (2, 9), (3, 16),
    (16, 3), (17, 2), (1, 31), (6, 8), (33, 4), (10, 10), (2, 0),
]  # fmt: skip


def walk(drafts, target, length, parents):
    """One row, as the words say it."""
    kept, slot, moved = [0], 0, True
    while moved:
        children = [d for d in range(length) if parents[d] + 1 == slot and drafts[d] == target[slot]]
        moved = bool(children)
        if moved:
            slot = children[0] + 1
            kept.append(slot)
    return len(kept) - 1, target[slot], kept + [-1] * (len(drafts) + 1 - len(kept))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_equals_the_walk(implementation, device, shape, tree, ragged):
    rows, count = shape
    drafts, target = torch.randint(2, (rows, count)), torch.randint(2, (rows, count + 1))
    lengths = torch.randint(count + 1, (rows,)) if ragged else None
    chain = torch.arange(-1, count - 1).expand(rows, count)
    parents = torch.stack([torch.randint(-1, d, (rows,)) for d in range(count)], 1) if tree and count else chain
    given = [None if t is None else t.to(device) for t in (drafts, target, lengths, parents if tree else None)]
    found = verify(*given)
    for i in range(rows):
        length = count if lengths is None else int(lengths[i])
        wanted = walk(drafts[i].tolist(), target[i].tolist(), length, parents[i].tolist())
        assert (int(found.accepted[i]), int(found.token[i]), found.keep[i].tolist()) == wanted


def test_chain_by_hand(implementation, device):
    drafts = torch.tensor([[5, 6, 7], [5, 6, 7], [1, 6, 7]], device=device)
    target = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 7], [2, 6, 7, 8]], device=device)
    found = verify(drafts, target)
    assert found.accepted.tolist() == [3, 2, 0] and found.token.tolist() == [8, 9, 2]
    assert found.keep.tolist() == [[0, 1, 2, 3], [0, 1, 2, -1], [0, -1, -1, -1]]


def test_not_contiguous(implementation, device):
    drafts, target = torch.randint(2, (4, 6), device=device), torch.randint(2, (8, 4), device=device)
    lengths = torch.tensor([[3, 0], [2, 0], [1, 0], [0, 0]], device=device)[:, 0]
    given = drafts[:, ::2], target[::2].t(), lengths
    for got, wanted in zip(verify(*given), verify(*(t.contiguous() for t in given)), strict=True):
        assert torch.equal(got, wanted)


def test_rejection_keeps_the_distribution(implementation):
    """Drafts from q, corrected: first tokens are distributed as p (chi-squared, 4 classes, below the 0.999 mark)."""
    n, p, q = 40_000, torch.tensor([0.5, 0.2, 0.25, 0.05]), torch.tensor([0.1, 0.6, 0.3, 0.0])
    generator = torch.Generator().manual_seed(5)
    drafts = torch.multinomial(q.expand(n, -1), 1, generator=generator)
    target, uniform = p.expand(n, 2, -1), torch.rand(n, 2, generator=generator)
    found = verify(drafts, target, proposal=q.expand(n, 1, -1), uniform=uniform)
    first = torch.where(found.accepted > 0, drafts[:, 0], found.token)
    seen = first.bincount(minlength=4).double()
    assert float(((seen - n * p) ** 2 / (n * p)).sum()) < 16.3  # 0.999 of chi-squared with 3 degrees
    assert float(found.accepted.double().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)
    assert not ((found.accepted == 0) & (found.token == 1)).any()  # max(0, p - q) is 0 there


@pytest.mark.parametrize("with_tree", [False, True])
def test_certain_drafts_keep_the_distribution(implementation, device, with_tree):
    n, p = 40_000, torch.tensor([0.5, 0.2, 0.25, 0.05])
    drafts = torch.tensor([[2, 0]]).expand(n, -1).to(device)
    parents = torch.tensor([[-1, -1]]).expand(n, -1).to(device) if with_tree else None
    if device == "cpu" and implementation == "triton":  # a program per row: the interpreter would take minutes
        n = 300
    target = p.expand(n, 3, -1).to(device)
    uniform = torch.rand(n, 3, generator=torch.Generator().manual_seed(1)).to(device)
    found = verify(drafts[:n], target, parents=None if parents is None else parents[:n], uniform=uniform)
    taken = drafts[:n].gather(1, (found.keep[:, 1:2] - 1).clamp(min=0))[:, 0]
    first = torch.where(found.accepted > 0, taken, found.token)
    seen = first.bincount(minlength=4).double().cpu()
    assert float(((seen - n * p) ** 2 / (n * p)).sum()) < 16.3


def test_rejection_by_hand():
    """Draft 1 stands (u q < p), draft 2 falls and max(0, p - q) leaves one class; a shorter row stops at its length."""
    drafts = torch.tensor([[0, 1, 1], [0, 1, 1]])
    p = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]]).expand(2, -1, -1)
    q = torch.tensor([[[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]]).expand(2, -1, -1)
    found = verify(drafts, p, torch.tensor([3, 1]), proposal=q, uniform=torch.tensor([[0.99, 0.5, 0.0, 0.95]] * 2))
    assert found.accepted.tolist() == [1, 1] and found.token.tolist() == [0, 1]
    assert found.keep.tolist() == [[0, 1, -1, -1]] * 2


def test_no_drafts_and_sampling():
    found = verify(torch.empty(1, 0, dtype=torch.long), torch.tensor([[[0.0, 1.0]]]), uniform=torch.tensor([[0.3]]))
    assert found.token.tolist() == [1] and found.accepted.tolist() == [0]


def test_draws_never_take_an_impossible_class():
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    numbers = torch.tensor([[0.0], [0.4999], [0.5], [0.99999999]])
    assert [int(draw(chances, n)) for n in numbers] == [1, 1, 3, 3]


TOKENS = {"drafts": torch.zeros(2, 3, dtype=torch.long), "target": torch.zeros(2, 4, dtype=torch.long)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drafts": torch.zeros(2, 3)}, "drafts int64"),
        ({"target": torch.zeros(2, 3, dtype=torch.long)}, "one more than drafts"),
        ({"target": torch.zeros(2, 4)}, "one more than drafts"),
        ({"target": torch.zeros(2, 4, 5)}, "to draw with"),
        ({"uniform": torch.zeros(2, 4)}, "to draw with"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, r"lengths must be \[2\]"),
        ({"parents": torch.zeros(2, 4, dtype=torch.long)}, r"parents must be \[2, 3\]"),
        ({"proposal": torch.zeros(2, 3, 5)}, "sampled chains"),
        (
            {"target": torch.zeros(2, 4, 5), "uniform": torch.zeros(2, 4), "proposal": torch.zeros(2, 3, 4)},
            "proposal must",
        ),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    with pytest.raises(BadArgument, match=said):
        verify(**{**TOKENS, **change})
