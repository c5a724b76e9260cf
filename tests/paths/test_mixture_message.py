"""Mixture messages: the backward filter against the exact likelihood of what follows, and its gradients."""

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.components import Products
from stochdyn.paths.mixture_message import MixtureMessage, jump_filter

F64 = torch.float64
RATE, SIGMA, NOISE, JUMP, SHIFT = 0.4, 0.5, 0.1, 4.0, 0.7


def number(*values):
    return torch.tensor(values, dtype=F64)


def problem(times=(0.0, 1.0), y=(0.0, 5.0), theta=0.0, substeps=6, rate=RATE):
    grid = sd.TimeGrid(number(*times), substeps=substeps)
    jumps = sd.CompoundPoisson(rate, sd.NormalJump(number(SHIFT), number(JUMP)))
    path = sd.JumpDiffusionPath(
        lambda t, z: -theta * z, number(SIGMA), jumps, torch.zeros(1, dtype=F64), grid.ts
    )
    seen = torch.ones(len(times), 1, dtype=torch.bool)
    seen[0] = False
    return grid, path, sd.Message.observed(grid, number(*y)[:, None], seen, NOISE)


def likelihood(z, y, ahead):
    """log p(y | z) a time `ahead` before: a Poisson mixture of normals."""
    terms = []
    for n in range(40):
        weight = -RATE * ahead + n * math.log(RATE * ahead) - math.lgamma(n + 1)
        deviation = math.sqrt(NOISE**2 + SIGMA**2 * ahead + JUMP**2 * n)
        terms.append(weight + torch.distributions.Normal(z + n * SHIFT, deviation).log_prob(number(y)[0]))
    return torch.logsumexp(torch.stack(terms), 0)


def test_the_filter_is_the_likelihood_of_what_follows():
    """Up to constants, and to the jumps beyond the last component; with fewer of these it is off by more."""
    grid, path, potential = problem()
    z = torch.linspace(-12, 12, 25, dtype=F64)
    worst = {}
    for components in (2, 3, 5):
        message = path.filtered(potential, components=components).time_major()
        errors = []
        for k in range(6):
            ahead = 1 - grid.ts[k].item()
            m = message[k]
            ours = m.log_value(z[:, None])
            exact = likelihood(z, 5.0, ahead)
            errors.append(((ours - ours[12]) - (exact - exact[12])).abs().max().item())
        worst[components] = max(errors)
    assert worst[5] < 1e-3 < worst[3] < 0.1 < worst[2]


def test_a_steep_drift_leaves_the_components_what_they_are():
    """Weights are values at zero, which a steep drift takes far below those of the components' own centres."""
    potential = problem(y=(0.0, 2.0))[2]
    ts = torch.linspace(0, 1, 7, dtype=F64)
    jumps = sd.CompoundPoisson(RATE, sd.NormalJump(number(SHIFT), number(JUMP)))
    found = []
    for slope in (0.0, 3e4):
        path = sd.JumpDiffusionPath(lambda t, z, s=slope: s + 0 * z, number(SIGMA), jumps, number(-slope), ts)
        m = path.filtered(potential).time_major()[0]
        found.append((m.precision[..., 0, 0], m.information[:, 0] / m.precision[:, 0, 0] + slope))
    (precision, centre), (steep, moved) = found
    assert (precision > 0).all() and torch.allclose(steep, precision, rtol=1e-6)
    assert torch.allclose(moved, centre, rtol=1e-6)


def test_component_c_holds_what_c_jumps_say():
    _, path, potential = problem(substeps=3)
    m = path.filtered(potential, components=4).time_major()[0]
    for n in range(3):
        variance = NOISE**2 + SIGMA**2 + JUMP**2 * n
        assert m.precision[n].item() == pytest.approx(1 / variance, rel=1e-9)
        assert (m.information[n] / m.precision[n]).item() == pytest.approx(5.0 - n * SHIFT, rel=1e-9)
    log_poisson = [n * math.log(RATE) - math.lgamma(n + 1) for n in range(3)]
    h, J = m.information[:, 0], m.precision[:, 0, 0]
    mass = m.log_weight + 0.5 * (h.square() / J - J.log())
    assert (mass[1] - mass[0]).item() == pytest.approx(log_poisson[1] - log_poisson[0], abs=1e-9)
    assert (mass[2] - mass[0]).item() == pytest.approx(log_poisson[2] - log_poisson[0], abs=1e-9)


def test_at_an_observation_all_are_one_and_after_the_last_there_is_none():
    _, path, potential = problem(times=(0.0, 1.0, 2.0), y=(0.0, 5.0, 5.2), theta=0.3, substeps=2)
    m = path.filtered(potential)
    weights = torch.softmax(m.log_weight, -1)
    assert (weights[[2, 4], 0] > 1 - 1e-12).all() and (weights[[1, 3], 1] > 1e-12).all()
    longer = sd.TimeGrid(number(0, 1, 3), substeps=2)
    seen = torch.tensor([[False], [True], [False]])
    tail = sd.Message.observed(longer, number(0, 5, 0)[:, None], seen, NOISE)
    _, path, _ = problem(times=(0.0, 1.0, 3.0), y=(0, 0, 0), substeps=2)
    after = path.filtered(tail)
    assert (after.precision[3:] == 0).all() and (after.information[3:] == 0).all()


def test_gradients_of_the_filter():
    def values(rate, loc, scale):
        grid = sd.TimeGrid(number(0, 1, 1.7), substeps=2)
        jumps = sd.CompoundPoisson(rate, sd.NormalJump(loc, scale))
        path = sd.JumpDiffusionPath(
            lambda t, z: -0.3 * z, number(SIGMA), jumps, torch.zeros(1, dtype=F64), grid.ts
        )
        seen = torch.tensor([[False], [True], [True]])
        m = path.filtered(sd.Message.observed(grid, number(0, 4, 4.2)[:, None], seen, NOISE))
        return m.log_value(number(0, 0.1, 4, 4, 4)[:, None])

    inputs = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.5, 0.3, 2.0)]
    assert torch.autograd.gradcheck(values, inputs)


def test_products_are_those_of_the_densities():
    message = MixtureMessage(number(0.2, -1.0), number(1.0, 0.5)[:, None], number(2.0, 0.1)[:, None, None])
    m, v, log_prior = number(0.3, -0.4), number(0.5, 2.0), number(0.7, 0.3).log()
    product = Products.of(log_prior, m[:, None], v.sqrt()[:, None], message)
    covariance = (product.spread / product.root[..., 0]).square()[:, 0]
    z = torch.linspace(-30, 30, 60001, dtype=F64)
    for n in range(2):
        for c in range(2):
            density = torch.distributions.Normal(m[n], v[n].sqrt()).log_prob(z) + log_prior[n]
            factor = message.log_weight[c] + z * (
                message.information[c, 0] - 0.5 * message.precision[c, 0, 0] * z
            )
            p = (density + factor).exp()
            mass = torch.trapezoid(p, z)
            mean = torch.trapezoid(z * p, z) / mass
            assert product.log_weight[2 * n + c].item() == pytest.approx(mass.log().item(), abs=1e-9)
            assert product.mean[2 * n + c, 0].item() == pytest.approx(mean.item(), abs=1e-9)
            spread = torch.trapezoid((z - mean) ** 2 * p, z) / mass
            assert covariance[2 * n + c].item() == pytest.approx(spread.item(), rel=1e-8)


def test_no_message_where_nothing_follows():
    message = MixtureMessage(torch.zeros(4, 3), torch.zeros(4, 3, 1), torch.ones(4, 3, 1, 1))
    some = message.masked(torch.tensor([True, False, True, True]))
    assert some.precision[:, 0, 0, 0].tolist() == [1, 0, 1, 1] and some.batch_shape == ()


def test_refused():
    _, path, potential = problem()
    around = torch.zeros(7, 1, dtype=F64)
    with pytest.raises(sd.GuideError, match="at least two components, got 1"):
        jump_filter(path, potential, around, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components": 1}, "at least two components, got 1"),
        ({"components": 2.5}, "at least two components, got 2.5"),
        ({"memory": -1}, "`memory` is a number of gaps between observations, got -1"),
        ({"memory": 0.5}, "`memory` is a number of gaps between observations, got 0.5"),
    ],
)
def test_numbers_of_components_that_are_none_are_named(options, words):
    _, path, potential = problem()
    with pytest.raises(sd.GuideError, match=words):
        path.filtered(potential, **options)
