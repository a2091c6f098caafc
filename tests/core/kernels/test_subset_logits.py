import pytest
import torch

from offramp.kernels.subset_logits import among, subset_logits


@pytest.mark.parametrize("lead", [(3,), (1,), (0,), (2, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_whole_projection_at_those_classes(lead, with_bias):
    hidden, weight = torch.randn(*lead, 8), torch.randn(11, 8)
    ids, bias = torch.randint(11, (*lead, 4)), torch.randn(11) if with_bias else None
    whole = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(subset_logits(hidden, weight, ids, bias), whole.gather(-1, ids), rtol=1e-5, atol=1e-5)


def test_the_nodes_of_a_tree_take_one_call():
    """Every node has candidates of its own; one call gives what a call per node gives."""
    hidden, weight, ids = torch.randn(7, 8), torch.randn(11, 8), torch.randint(11, (7, 4))
    one_by_one = [subset_logits(hidden[n : n + 1], weight, ids[n : n + 1]) for n in range(7)]
    torch.testing.assert_close(subset_logits(hidden, weight, ids), torch.cat(one_by_one))


def test_type_of_the_states_is_kept():
    out = subset_logits(torch.randn(2, 8).bfloat16(), torch.randn(11, 8).bfloat16(), torch.tensor([[1, 2], [3, 4]]))
    assert out.dtype == torch.bfloat16


def test_among():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 9.0]])
    assert among(logits, torch.tensor([[0, 1], [1, 2], [2, 2]])).tolist() == [True, False, True]
