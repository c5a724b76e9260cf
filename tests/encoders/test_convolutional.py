import pytest
import torch

import stochdyn as sd
from stochdyn.errors import ShapeError

F64 = torch.float64
POINTS = 40


def reach(net):
    """How many observed times entry 0 depends on."""
    values = torch.randn(1, POINTS, 1, dtype=F64, requires_grad=True)
    x = torch.cat([values.flip(1), torch.ones(1, POINTS, 2, dtype=F64)], -1)

    class Given:
        stepped = x

    (gradient,) = torch.autograd.grad(net.encode(Given())[0, -1].sum(), values)
    used = gradient[0, :, 0] != 0
    assert used[: int(used.sum())].all()  # the nearest ones
    return int(used.sum())


@pytest.mark.parametrize(("layers", "kernel", "field"), [(1, 3, 3), (2, 3, 7), (3, 4, 22), (4, 1, 1)])
def test_convolutions_reach_the_receptive_field_and_the_mean_everything(layers, kernel, field):
    torch.manual_seed(0)
    net = sd.ConvEncoder(1, 6, layers=layers, kernel=kernel).double()
    assert net.receptive_field == field
    assert reach(net) == POINTS
    with torch.no_grad():
        net.merge.weight[:, 6:] = 0
    assert reach(net) == field


def test_a_layer_looks_backwards_over_rows_by_its_dilation():
    torch.manual_seed(0)
    net = sd.ConvEncoder(1, 4, layers=1, kernel=2).double()
    times, values = torch.tensor([0.0, 1.0, 3.0], dtype=F64), torch.randn(3, 1, dtype=F64)
    got = net(sd.Series(times, values[None]))[0]
    rows = [
        torch.stack([values[k, 0], torch.tensor(1.0), g]).double()
        for k, g in ((0, times[1]), (1, times[2] - 1), (2, 0 * times[0]))
    ]
    rows.append(torch.zeros(3, dtype=F64))
    weight, bias = net.convolutions[0].weight, net.convolutions[0].bias
    after = [
        torch.nn.functional.silu(weight[..., 0] @ rows[k + 1] + weight[..., 1] @ rows[k] + bias)
        for k in range(3)
    ]
    for k in range(3):
        expected = net.merge(torch.cat([after[k], torch.stack(after[k:]).mean(0)]))
        torch.testing.assert_close(got[k], expected, rtol=0, atol=1e-12)


def test_sizes_below_one_are_refused():
    with pytest.raises(ShapeError, match="layers and kernel must be at least 1, got 0 and 3"):
        sd.ConvEncoder(1, layers=0, kernel=3)
