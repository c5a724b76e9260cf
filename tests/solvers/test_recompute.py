"""Functions that run again for their gradient: what they read, what is kept, and what must not be lost."""

import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.errors import FieldError
from stochdyn.solvers.recompute import Reads, reads, recomputed
from tests.orders import F64

Z = torch.tensor([0.3, -0.7], dtype=F64)


def tensor(*values):
    return torch.tensor(values, dtype=F64, requires_grad=True)


def same_gradients(run, z, wanted):
    """The gradient through `recomputed` against that through the function itself."""
    direct = torch.autograd.grad(run(z).square().sum(), wanted, retain_graph=True)
    again = torch.autograd.grad(recomputed(run, z, reads(run, z)).square().sum(), wanted)
    return all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


def test_captured_tensors_parameters_and_the_argument_get_their_gradients():
    net, k, z = sd.MLP(2, 2, (4,)).double(), tensor(1.5), Z.clone().requires_grad_()
    theta = 2.0 * k

    def run(z):
        return net(z) * theta + z.exp()

    assert {id(t) for t in reads(run, Z) or []} == {id(t) for t in [*net.parameters(), theta]}
    assert same_gradients(run, z, [z, k, *net.parameters()])


def test_a_tensor_left_out_of_the_list_is_named_rather_than_lost():
    k, w = tensor(1.5), tensor(0.5)
    out = recomputed(lambda z: k * z + w.exp(), Z, [k])
    with pytest.raises(FieldError, match=r"tensors of shapes \[\(1,\)\].*did not read in its first step"):
        out.sum().backward()


def test_a_field_that_reads_a_latent_late_is_refused():
    k, w = tensor(1.0), tensor(0.5)

    def field(t, z):
        return -k * z + (w * z if t > 0.5 else 0.0)

    ts = torch.linspace(0, 1, 17, dtype=F64)
    z = sd.odeint(field, Z, ts, solver=sd.Heun(), gradient=sd.Checkpointed())
    with pytest.raises(FieldError, match=r"gradient=sd\.Direct\(\)"):
        z.sum().backward()


def test_a_latent_made_late_from_a_known_one_keeps_its_gradient():
    k = tensor(1.0)
    made = k + 1.0

    def field(t, z):
        return -k * z + (made * z if t > 0.5 else 0.0)

    def slope(gradient):
        ts = torch.linspace(0, 1, 17, dtype=F64)
        z = sd.odeint(field, Z, ts, solver=sd.Heun(), gradient=gradient)
        return torch.autograd.grad(z.sum(), k, retain_graph=True)[0]

    assert (slope(sd.Checkpointed()) - slope(sd.Direct())).abs() < 1e-12


def test_a_latent_made_from_another_that_is_read_too_is_not_counted_twice():
    """The control is the list that would count it twice."""
    k = tensor(0.7)
    made = 2.0 + k

    def run(z):
        return k * z + made * z.sin()

    assert reads(run, Z) is None
    assert same_gradients(run, Z, [k])
    twice = torch.autograd.grad(recomputed(run, Z, [k, made]).square().sum(), k, retain_graph=True)[0]
    assert (twice - torch.autograd.grad(run(Z).square().sum(), k)[0]).abs() > 0.1


def test_latents_with_a_maker_in_common_are_two():
    k = tensor(0.7)
    first, second = k.exp(), k.sin()

    def run(z):
        return first * z + second * z.sin()

    found = reads(run, Z)
    assert found is not None and [id(t) for t in found] == [id(first), id(second)]
    direct = torch.autograd.grad(run(Z).square().sum(), k, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(recomputed(run, Z, found).square().sum(), k)[0], direct)


def test_what_cannot_be_watched_is_left_to_torch():
    """A tensor that appears from nowhere at every call, as from compiled code."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, k):
            ctx.save_for_backward(z, k)
            return z * k

        @staticmethod
        def backward(ctx, grad):
            z, k = ctx.saved_tensors
            return grad * k, (grad * z).sum()[None]

    k = tensor(2.0)

    def run(z):
        return Hidden.apply(z, k) + 1.0

    assert reads(run, Z) is None
    assert same_gradients(run, Z, [k])


def test_parametrised_weights_are_made_inside():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2).double())

    def run(z):
        return layer(z).tanh()

    found = reads(run, Z)
    assert found is not None and {id(t) for t in found} == {id(p) for p in layer.parameters()}
    assert same_gradients(run, Z, list(layer.parameters()))


def test_a_view_of_a_captured_tensor_counts_as_the_tensor():
    theta = tensor(0.5, 1.5)
    with Reads() as watched:
        _ = theta[0] * Z + theta[1]
    assert [found is theta for found in watched.found] == [True]


def test_second_derivatives_are_refused_not_wrong():
    k = tensor(0.7)
    z = recomputed(lambda z: (k * z).exp(), Z, [k])
    with pytest.raises(FieldError, match=r"second derivative .* gradient=sd\.Direct\(\)"):
        torch.autograd.grad(z.sum(), k, create_graph=True)


def test_a_latent_made_with_a_kept_graph_and_read_in_many_segments():
    w = tensor(0.3)
    made = w.exp()

    def slope(gradient):
        ts = torch.linspace(0, 1, 17, dtype=F64)
        z = sd.odeint(
            lambda t, z: -(w * z) if t < 0.5 else -(made * z), Z, ts, solver=sd.Heun(), gradient=gradient
        )
        return torch.autograd.grad(z.sum(), w, retain_graph=True)[0]

    assert (slope(sd.Checkpointed()) - slope(sd.Direct())).abs() < 1e-12
