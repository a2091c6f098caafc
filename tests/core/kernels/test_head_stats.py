"""Head statistics against float64: shapes that divide by nothing, ties, masked and broken rows, norms, LoRA, int8."""

import importlib
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from offramp.errors import BadArgument
from offramp.kernels.confidence import confidence
from offramp.kernels.head_stats import NAMED, HeadStats, Lora, Norm, head_stats, parts

#: classes per block and programs per weight in these tests, so that several of both are needed soon
BLOCK, SPLITS = 1024, 8

#: rows, classes, width
SHAPES = [
    (1, 1, 1), (1, 2, 3), (2, 1, 8), (3, 5, 7), (1, 127, 16), (2, 128, 16), (3, 129, 17), (4, 64, 64), (5, 63, 65),
    (1, 65, 129), (7, 1000, 31), (16, 257, 40), (17, 300, 33), (64, 200, 24), (65, 130, 20), (1, BLOCK, 9),
    (2, BLOCK + 1, 5), (3, BLOCK - 1, 4), (2, 4099, 100), (1, 2 * BLOCK + 37, 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    for name in ("BLOCK", "LOGITS"):
        monkeypatch.setattr(sys.modules["offramp.kernels.head_stats"], name, BLOCK)
    if "triton" in request.node.name:
        monkeypatch.setattr(importlib.import_module("offramp.kernels.triton.head_stats"), "SPLITS", SPLITS)


def make(rows, classes, width, dtype, device):
    generator = torch.Generator().manual_seed(rows * 7 + classes * 3 + width)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (3 * torch.randn(classes, width, generator=generator) / width**0.5).to(dtype)
    return hidden.to(device), weight.to(device)


def as_told(implementation, *unknown):
    """Where C++ knows no such argument or type, it says so, and torch runs."""
    if implementation != "cpp" or not unknown:
        return nullcontext()
    said = f"head_stats: cpp is not used: it knows no {', '.join(unknown)}; torch runs instead"
    return pytest.warns(UserWarning, match=said)


def bound(hidden, weight, unit, logits):
    """Largest error of a logit: float32 sums over the width, and one rounding to the type."""
    sums = hidden.shape[1] * 2.0**-24 * (hidden.double().abs() @ weight.double().abs().T).max()
    return float(2 * sums + 2 * unit * logits.abs().max() + 1e-6)


def agrees(found, logits, error):
    """The statistics of `logits` float64 [rows, classes], each off by at most `error`."""
    rows = torch.arange(len(logits))
    pair = logits.topk(min(2, logits.shape[1]), -1).values
    assert (logits[rows, found.label.cpu()] >= pair[:, 0] - 2 * error).all()
    assert found.label.dtype == torch.int64 and found.first.dtype == torch.float32
    assert ((found.first.cpu() - pair[:, 0]).abs() <= error).all()
    if pair.shape[1] == 2:
        assert ((found.second.cpu() - pair[:, 1]).abs() <= error).all()
    else:
        assert (found.second == -torch.inf).all()
    if found.logsumexp is not None:
        assert ((found.logsumexp.cpu() - logits.logsumexp(-1)).abs() <= error + 1e-5).all()
    if found.entropy is not None:
        wanted = torch.special.entr(logits.softmax(-1)).sum(-1)
        # d entropy = sum p |log p + entropy| d logit <= 2 entropy d logit
        assert ((found.entropy.cpu() - wanted).abs() <= 2 * error * (wanted + 1) + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(implementation, device, dtype, unit, shape):
    hidden, weight = make(*shape, dtype, device)
    logits = (hidden.double() @ weight.double().T).cpu()
    with as_told(implementation, *(["torch.float16"] if dtype == torch.float16 else [])):
        found = head_stats(hidden, weight)
    agrees(found, logits, bound(hidden, weight, unit, logits))


@pytest.mark.parametrize("needs", [set(), {"logsumexp"}, {"entropy"}])
def test_makes_only_what_is_asked_for(implementation, device, needs):
    hidden, weight = make(3, 300, 20, torch.float32, device)
    found = head_stats(hidden, weight, needs=needs)
    assert (found.logsumexp is not None) == ("logsumexp" in needs)
    assert (found.entropy is not None) == ("entropy" in needs)
    agrees(found, (hidden.double() @ weight.double().T).cpu(), 1e-4)


def test_ties_go_to_the_lowest_class(implementation, device):
    """The same class twice, far apart, in other segments, blocks and splits, and three times."""
    weight = torch.zeros(BLOCK + 300, 4, device=device)
    weight[[130, 131, 400, BLOCK + 7], 0] = 1
    weight[[5, BLOCK + 299], 1] = 2
    weight[17, 2] = 3
    found = head_stats(torch.eye(4, device=device), weight)
    assert found.label.tolist() == [130, 5, 17, 0]
    assert found.first.tolist() == [1, 2, 3, 0] and found.second.tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("center", [False, True])
def test_with_norm_bias_lora_and_soft_cap(implementation, device, center):
    torch.manual_seed(3)
    hidden, weight = make(5, 301, 24, torch.float32, device)
    bias = torch.randn(301, device=device)
    norm = Norm(torch.rand(24, device=device) + 0.5, 1e-5, torch.randn(24, device=device) if center else None, center)
    lora = Lora(torch.randn(3, 24, device=device) / 5, torch.randn(301, 3, device=device), 0.5)
    with as_told(implementation, "bias", "lora", "softcap"):
        found = head_stats(hidden, weight, bias, norm, lora, softcap=4.0)
    alone = head_stats(hidden, weight, norm=norm)
    gain, shift = norm.weight.double(), None if norm.bias is None else norm.bias.double()
    x, size = hidden.double(), (24,)
    x = layer_norm(x, size, gain, shift, 1e-5) if center else rms_norm(x, size, gain, 1e-5)
    agrees(alone, (x @ weight.double().T).cpu(), 1e-5)
    logits = x @ weight.double().T + bias + 0.5 * (x @ lora.down.double().T) @ lora.up.double().T
    agrees(found, (4 * torch.tanh(logits / 4)).cpu(), 1e-5)


def test_int8_weight(implementation, device):
    hidden = torch.randn(3, 40, device=device)
    weight = torch.randint(-127, 128, (150, 40), dtype=torch.int8, device=device)
    scale = torch.rand(150, device=device) / 100
    logits = hidden.double() @ weight.double().T * scale.double()
    with as_told(implementation, "scale"):
        found = head_stats(hidden, weight, scale=scale)
    agrees(found, logits.cpu(), 1e-4)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 200, BLOCK + 3])
def test_a_broken_logit_breaks_its_row(implementation, device, broken, place):
    weight = torch.randn(BLOCK + 10, 2, device=device)
    weight[place, 0] = broken
    found = head_stats(torch.tensor([[1.0, 0.0]], device=device), weight)
    assert found.label.tolist() == [0] and all(value.isnan().all() for value in found[1:])


def test_a_nan_state_breaks_its_row_alone(implementation, device):
    hidden, weight = make(4, 200, 8, torch.float32, device)
    hidden[2, 3] = torch.nan
    found = head_stats(hidden, weight)
    assert all(value.isnan().tolist() == [False, False, True, False] for value in found[1:]) and found.label[2] == 0


def test_masked_classes_add_nothing(implementation, device):
    """A bias of -inf rules classes out, also whole blocks of them; a row without any class is broken."""
    hidden, weight = make(2, BLOCK + 200, 6, torch.float32, device)
    bias = torch.full((BLOCK + 200,), -torch.inf, device=device)
    with as_told(implementation, "bias"):
        assert head_stats(hidden, weight, bias).first.isnan().all()
    bias[[3, 150]] = 0.0
    logits = hidden.double() @ weight.double().T
    found = head_stats(hidden, weight, bias)
    wanted = logits[:, [3, 150]].cpu()
    assert found.label.tolist() == torch.tensor([3, 150])[wanted.argmax(-1)].tolist()
    torch.testing.assert_close(found.logsumexp.double().cpu(), wanted.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.entropy.double().cpu(), torch.special.entr(wanted.softmax(-1)).sum(-1), rtol=1e-4, atol=1e-5
    )


def test_named_as_confidence_names_them(implementation, device):
    hidden, weight = make(6, 500, 30, torch.float32, device)
    wanted = confidence(hidden @ weight.T, NAMED)
    found = head_stats(hidden, weight).named(NAMED)
    assert found.keys() == NAMED
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert parts({"label"}) == set() and parts({"margin"}) == {"logsumexp"} and parts({"entropy"}) == {"entropy"}
    for needs in ({"top1"}, {"entropy"}, {"label", "margin"}):
        assert head_stats(hidden, weight, needs=parts(needs)).named(needs).keys() == needs


def test_no_rows(implementation, device):
    found = head_stats(torch.empty(0, 4, device=device), torch.randn(9, 4, device=device))
    assert isinstance(found, HeadStats) and all(value.shape == (0,) for value in found)


def test_not_contiguous(implementation, device):
    hidden, weight = make(6, 200, 20, torch.float32, device)
    a = head_stats(hidden[::2, ::2], weight[::3, ::2])
    b = head_stats(hidden[::2, ::2].contiguous(), weight[::3, ::2].contiguous())
    for got, wanted in zip(a, b, strict=True):
        torch.testing.assert_close(got, wanted)


def test_rows_do_not_depend_on_one_another(implementation, device):
    """In tolerance: a product of one row takes another way through the hardware than one of eight."""
    hidden, weight = make(8, 700, 32, torch.float32, device)
    together = head_stats(hidden, weight)
    for i in range(8):
        for got, wanted in zip(head_stats(hidden[i : i + 1], weight), together, strict=True):
            torch.testing.assert_close(got, wanted[i : i + 1], rtol=1e-5, atol=1e-5)


def test_gradients_come_from_the_reference(implementation, device):
    hidden, weight = make(3, 50, 8, torch.float32, device)
    hidden.requires_grad_()
    head_stats(hidden, weight, needs={"logsumexp"}).logsumexp.sum().backward()
    wanted = (hidden.detach() @ weight.T).softmax(-1) @ weight
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "flatten leading dimensions"),
        ({"weight": torch.zeros(5, 3)}, "head_stats takes hidden"),
        ({"weight": torch.zeros(0, 4)}, "at least one class"),
        ({"weight": torch.zeros(5, 4).half()}, r"hidden.to\(weight.dtype\)"),
        ({"weight": torch.zeros(5, 4, dtype=torch.int8)}, "needs scale="),
        ({"bias": torch.zeros(4)}, "one per class"),
        ({"lora": Lora(torch.zeros(2, 4), torch.zeros(5, 3))}, "lora must be"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"norm": torch.nn.LayerNorm(4)}, "not LayerNorm"),
        ({"needs": {"top1"}}, "choose of"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "on cpu and on meta"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    with pytest.raises(BadArgument, match=said):
        head_stats(**{"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), **change})
