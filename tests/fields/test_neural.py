"""Neural fields: batched weights, context apart from the state, one net per coordinate."""

import pytest
import torch

import stochdyn as sd
from stochdyn.fields import Linear

F64 = torch.float64


def batched(net, particles):
    """A copy of a net whose weights have a particle dimension and one for the series; and a list of single nets."""
    singles = [sd.MLP(3, 2, hidden=(5, 4)).double() for _ in range(particles)]
    for k, layer in enumerate(net.layers):
        for name in ("weight", "bias"):
            stack = torch.stack([getattr(single.layers[k], name).detach() for single in singles])
            delattr(layer, name)
            setattr(layer, name, stack[:, None])
    return singles


def test_batched_weights_equal_a_loop():
    net, x = sd.MLP(3, 2, hidden=(5, 4)).double(), torch.randn(6, 7, 3, dtype=F64)
    singles = batched(net, 6)
    looped = torch.stack([single(row) for single, row in zip(singles, x, strict=True)])
    torch.testing.assert_close(net(x), looped)
    torch.testing.assert_close(net(x[0]), torch.stack([single(x[0]) for single in singles]))


def test_mlp_equals_torch():
    net = sd.MLP(3, 2, hidden=(5,), activation=torch.tanh, final=torch.sigmoid).double()
    plain = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2), torch.nn.Sigmoid()
    ).double()
    with torch.no_grad():
        for own, other in zip(net.layers, (plain[0], plain[2]), strict=True):
            other.weight.copy_(own.weight)
            other.bias.copy_(own.bias)
    x = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(net(x), plain(x))


def test_initial_weights_have_unit_order():
    torch.manual_seed(0)
    weight = Linear(100, 50).weight.detach()
    assert weight.abs().max() <= 0.1
    assert weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("time", [False, True])
def test_context_apart_equals_context_beside(time):
    field = sd.NeuralField(2, 3, hidden=(5,), context_dim=4, time=time).double()
    z, c, t = (torch.randn(6, 7, n, dtype=F64) for n in (2, 4, 1))
    beside = torch.cat([z, c, t], -1) if time else torch.cat([z, c], -1)
    torch.testing.assert_close(field(t, z, c), field.net(beside))
    rows, value = field.prepared(c)
    assert rows.shape == (6, 7, 5)
    torch.testing.assert_close(value(t, z, rows), field.net(beside))
    torch.testing.assert_close(field.from_contribution(t, z, field.contribution(c)), field.net(beside))


def test_without_context():
    field, z = sd.NeuralField(2, hidden=(5,)).double(), torch.randn(6, 2, dtype=F64)
    torch.testing.assert_close(field(torch.zeros(1, dtype=F64), z), field.net(z))
    with pytest.raises(sd.FieldError, match="made for a context of size 0, got 3. Set context_dim=3"):
        field(torch.zeros(1), z, torch.zeros(6, 3))
    with pytest.raises(sd.FieldError, match="made for a context of size 3, got 0"):
        sd.NeuralField(2, context_dim=3)(torch.zeros(1), torch.zeros(6, 2))


def test_elementwise_sees_its_own_coordinate_alone():
    field = sd.ElementwiseField(3, hidden=8, scale=2.0, floor=0.1).double()
    t = torch.zeros(1, dtype=F64)
    J = torch.autograd.functional.jacobian(lambda z: field(t, z), torch.randn(3, dtype=F64))
    assert torch.equal(J, torch.diag(J.diagonal()))
    assert J.diagonal().abs().min() > 0
    values = field(t, 100 * torch.randn(4, 50, 3, dtype=F64))
    assert values.shape == (4, 50, 3)
    assert (values >= 0.1).all()
    assert (values <= 2.1).all()


def test_elementwise_is_one_net_per_coordinate():
    field, z = sd.ElementwiseField(3, hidden=8).double(), torch.randn(5, 3, dtype=F64)
    columns = []
    for d in range(3):
        hidden = torch.nn.functional.softplus(z[:, d, None] * field.weight[d] + field.bias[d])
        columns.append(torch.sigmoid(hidden @ field.out_weight[d] + field.out_bias[d]) + 1e-3)
    torch.testing.assert_close(field(torch.zeros(1), z), torch.stack(columns, -1))


def test_slope_is_the_derivative():
    field, z = (
        sd.ElementwiseField(3, hidden=8, scale=1.5).double(),
        torch.randn(5, 3, dtype=F64, requires_grad=True),
    )
    value, slope = field.with_slope(torch.zeros(1), z)
    torch.testing.assert_close(value, field(torch.zeros(1), z))
    torch.testing.assert_close(slope, torch.autograd.grad(value.sum(), z, create_graph=True)[0])


def test_refused():
    with pytest.raises(sd.ShapeError, match=r"sizes must be at least 1, got \[0, 4, 2\]"):
        sd.MLP(0, 2, hidden=(4,))
    for options in ({"scale": 0.0}, {"floor": -1.0}):
        with pytest.raises(sd.FieldError, match="needs scale > 0 and floor >= 0"):
            sd.ElementwiseField(2, **options)
