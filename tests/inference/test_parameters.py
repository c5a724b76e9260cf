"""Parameters: found everywhere, once each, lazily; buffers put back."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from stochdyn.errors import FitError
from stochdyn.inference.objective import ELBO
from stochdyn.inference.parameters import (
    Parameters,
    guide_parameters,
    leaves,
    modules_of,
    parameters_of,
    restore_buffers,
    save_buffers,
)


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.plain = nn.Linear(1, 1)

    def forward(self, y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale))
            pyro.sample("y", dist.Normal(self.plain(z[:, None])[:, 0], 1.0), obs=y)


def collected(model, guide, y, runs=2):
    parameters = Parameters({"model": model, "guide": guide})
    parameters.collect()
    for _ in range(runs):
        with pyro.poutine.trace(param_only=True) as capture:
            loss = ELBO().loss(model, guide, y)
        parameters.collect(capture.trace)
    parameters.check_complete(loss)
    loss.backward()
    return parameters


@pytest.mark.parametrize("local", [False, True])
def test_modules_and_guides_are_found_once(local):
    with pyro.settings.context(module_local_params=local):
        model = Net()
        parameters = collected(model, AutoNormal(model), torch.zeros(3))
        assert set(parameters.named()) == {
            *("model.scale_unconstrained", "model.loc", "model.plain.weight", "model.plain.bias"),
            *("guide.locs.z_unconstrained", "guide.scales.z_unconstrained"),
        }
        assert all(tensor.grad is not None for tensor in parameters.named().values())


def test_expanded_views_become_trainable():
    # Pyro's guides may make such parameters, and no optimiser can write to them.
    view = nn.Parameter(torch.zeros(1).expand(3))
    parameters = Parameters({"guide": nn.ParameterList([view])})
    parameters.collect()
    view.grad = torch.tensor([1.0, -1.0, 0.0])
    parameters.update(0.5)
    torch.testing.assert_close(view.detach(), torch.tensor([-0.5, 0.5, 0.0]))


def test_param_statements_are_found_by_their_unconstrained_leaf():
    def guide(y):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.5)), pyro.param("s", torch.tensor(2.0))))

    def model(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.param("s", torch.tensor(2.0))

    parameters = collected(model, guide, None)
    assert list(parameters.named()) == ["m", "s"]
    assert parameters.named()["m"] is pyro.get_param_store()["m"].unconstrained()


def test_later_parameters_join():
    parameters = Parameters({"model": nn.Linear(1, 1)})
    parameters.collect()
    other = pyro.poutine.trace(lambda: pyro.param("late", torch.tensor(3.0))).get_trace()
    parameters.collect(other)
    assert list(parameters.named()) == ["model.weight", "model.bias", "late"]
    for tensor in parameters.named().values():
        tensor.grad = torch.ones_like(tensor)
    parameters.update(0.5)
    assert pyro.get_param_store()["late"].item() == pytest.approx(2.5)
    assert [len(group["params"]) for group in parameters.optimizer.param_groups] == [2, 1]


def test_frozen_and_uninitialised_parameters_wait():
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1).requires_grad_(False))
    parameters = Parameters({"model": net})
    parameters.collect()
    assert len(parameters) == 0
    net(torch.zeros(1, 3))
    parameters.collect()
    assert list(parameters.named()) == ["model.0.weight", "model.0.bias"]


def test_not_finite_from_the_start():
    net = nn.Linear(1, 1)
    nn.init.constant_(net.bias, float("nan"))
    with pytest.raises(FitError, match=r"parameter guide\.bias: is not finite before training"):
        Parameters({"guide": net}).collect()


def test_untrained_leaves_are_named():
    net = nn.Linear(1, 1)
    parameters = Parameters({"model": nn.Linear(1, 1)})
    parameters.collect()
    with pytest.warns(UserWarning, match=r"2 parameters.* not trained.*pyro\.module"):
        parameters.check_complete(net(torch.zeros(1, 1)).sum())
    parameters.check_complete(torch.zeros(1, requires_grad=True).sum())  # a leaf of a distribution's own


def test_nothing_to_train():
    with pytest.raises(FitError, match="neither model nor guide has parameters"):
        Parameters({"model": print}).check_complete(torch.zeros(()))
    parameters = Parameters({"model": nn.Linear(1, 1)})
    parameters.collect()
    with pytest.raises(FitError, match="depends on none of the 2 parameters"):
        parameters.check_complete(torch.zeros(()))


def test_programs_lead_to_their_modules():
    net = Net()
    handled = pyro.poutine.scale(pyro.poutine.condition(net, {}), scale=2.0)
    for program in (net, net.forward, functools.partial(net.forward, 1), functools.partial(net), handled):
        assert modules_of(program) == [net]
    assert modules_of(lambda: net) == []


def test_clipping():
    weight = nn.Parameter(torch.zeros(2))
    parameters = Parameters({"model": nn.ParameterList([weight])})
    parameters.collect()
    weight.grad = torch.tensor([3.0, 4.0])
    assert parameters.clip(float("inf")).item() == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert parameters.clip(1.0).item() == 5.0
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_buffers_are_put_back_even_if_they_were_replaced():
    norm = nn.BatchNorm1d(1)
    norm.register_buffer("none", None)
    kept, saved = norm.running_var, save_buffers([norm])
    norm(torch.randn(5, 1))
    norm.running_mean = torch.full((1,), float("nan"))
    norm.none = torch.ones(1)
    restore_buffers(saved)
    assert norm.running_var is kept
    assert (norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()) == (
        0.0,
        1.0,
        0,
    )
    assert norm.none is None


def test_what_the_guide_has_alone_is_told_by_identity():
    model = Net()
    guide = nn.Sequential(model.plain, nn.Linear(1, 1))

    def program():
        pyro.module("shared", model.plain)
        pyro.param("own", torch.zeros(2), dist.constraints.positive)

    def owned(guide):
        traces = [
            pyro.poutine.trace(p).get_trace(*args) for p, args in ((model, (torch.zeros(3),)), (program, ()))
        ]
        return guide_parameters(model, guide, *traces)

    unconstrained = pyro.get_param_store()
    alone = owned(guide)
    assert [id(p) for p in alone[:2]] == [id(guide[1].weight), id(guide[1].bias)]
    assert len(alone) == 3
    assert alone[2] is unconstrained["own"].unconstrained()
    assert set(parameters_of(guide)) == {id(p) for p in guide.parameters()}


def test_a_part_alone_is_moved():
    net = nn.Linear(2, 1)
    parameters = Parameters({"model": net})
    parameters.collect()
    net(torch.ones(1, 2)).sum().backward()
    before = net.weight.detach().clone(), net.bias.detach().clone()
    parameters.keep(frozenset([id(net.bias)]))
    parameters.update(0.1)
    assert torch.equal(net.weight, before[0])
    assert not torch.equal(net.bias, before[1])


def test_leaves_of_a_loss():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert {id(leaf) for leaf in leaves((a * b).sum() + a.detach().sum())} == {id(a), id(b)}
    assert id(c) not in {id(leaf) for leaf in leaves((a * b).sum())}
