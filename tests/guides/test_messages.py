"""Message families: what their numbers mean, and where they start."""

import pytest
import torch

import stochdyn as sd
from stochdyn.guides.messages import AbstractMessageFamily, masked
from stochdyn.paths import Message
from tests.programs import F64

UNIT = torch.tensor([2.0, 0.5], dtype=F64)
AROUND = torch.arange(10, dtype=F64).reshape(5, 2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def base():
    root = torch.randn(5, 2, 2, dtype=F64)
    return Message(torch.randn(5, 2, dtype=F64), root @ root.mT)


def test_the_filter_starts_at_its_base():
    family, given = sd.FilterMessage(), base()
    message = family.build(family.start(2).double().expand(5, -1), UNIT, AROUND, given)
    torch.testing.assert_close(message.information, given.information)
    torch.testing.assert_close(message.precision, given.precision)


def test_the_filters_numbers_scale_and_shift():
    family, given = sd.FilterMessage(), base()
    numbers = torch.zeros(5, family.numbers(2), dtype=F64)
    numbers[:, 0] = 1.0  # doubles the first row of C
    numbers[:, 4] = 0.5  # moves the centre of the first state by half its unit
    message = family.build(numbers, UNIT, AROUND, given)
    C = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    J = C @ given.precision @ C
    torch.testing.assert_close(message.precision, J)
    moved = AROUND + torch.tensor([1.0, 0.0], dtype=F64)
    # Where the centre was, the gradient is the base's; the shift moves it along J.
    torch.testing.assert_close(message.gradient(moved), given.gradient(AROUND))
    with pytest.raises(ValueError, match="got none"):
        family.build(numbers, UNIT, AROUND, None)


@pytest.mark.parametrize(("rank", "count"), [(None, 5), (0, 4), (1, 6), (2, 8)])
def test_free_messages_start_at_a_small_precision(rank, count):
    family = sd.FreeMessage(rank=rank, init=0.2)
    assert family.numbers(2) == count
    message = family.build(family.start(2).double().expand(5, -1), UNIT, AROUND, None)
    assert message.diagonal == (rank == 0)
    torch.testing.assert_close(
        message.full(), torch.diag(0.2 / UNIT**2).expand(5, 2, 2), atol=0.01 if rank else 1e-6, rtol=0
    )
    torch.testing.assert_close(message.gradient(AROUND), torch.zeros(5, 2, dtype=F64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("rank", [None, 0, 1, 2])
def test_free_precisions_are_positive(rank):
    family = sd.FreeMessage(rank=rank)
    numbers = torch.randn(7, 5, family.numbers(2), dtype=F64, requires_grad=True)
    message = family.build(numbers, UNIT, AROUND, None)
    J = message.full()
    assert torch.linalg.eigvalsh(J).min() > 0
    torch.testing.assert_close(J, J.mT)
    assert (J[..., 0, 1].abs().max() > 1e-3) == (rank != 0)
    gradient = torch.autograd.grad(J.sum() + message.information.sum(), numbers)[0]
    assert (gradient.abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("diagonal", [False, True])
def test_masked_messages_say_nothing(diagonal):
    given = base()
    J = given.precision.diagonal(dim1=-2, dim2=-1) if diagonal else given.precision
    valid = torch.tensor([True, False, True, False, False])
    message = masked(Message(given.information, J), valid)
    assert message.diagonal == diagonal
    for part, whole in ((message.information, given.information), (message.precision, J)):
        torch.testing.assert_close(part[valid], whole[valid])
        assert not part[~valid].any()


def test_families_are_abstract_or_final():
    with pytest.raises(TypeError, match="abstract"):
        AbstractMessageFamily()
