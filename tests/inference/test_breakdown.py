"""The diagnosis names sites, gradients and parameters."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from stochdyn.errors import DivergedError
from stochdyn.inference.breakdown import bad_sites, breakdown
from stochdyn.inference.objective import ELBO
from stochdyn.inference.parameters import Parameters


def model(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, subsample_size=2):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def test_good_programs_have_no_bad_sites():
    assert bad_sites(model, guide, (torch.zeros(2),)) == []


def test_a_wrong_scale_shows_in_the_observed_site():
    found = bad_sites(model, guide, (torch.tensor([1.0, -3e25]),))
    assert found == ["model site 'y' (observed, largest |value| 3e+25)"]


def test_a_bad_latent_shows_in_both_programs():
    def broken(y):
        pyro.sample("z", dist.Normal(float("nan"), 1.0))

    found = bad_sites(model, broken, (torch.zeros(2),))
    assert found[:2] == ["guide site 'z'", "model site 'z'"]


def test_a_program_that_stops_is_followed_as_far_as_it_came():
    def stops(y):
        pyro.sample("w", dist.Delta(torch.tensor(float("inf"))))
        raise DivergedError("time 0.3")

    assert bad_sites(stops, guide, (None,)) == ["DivergedError: time 0.3", "model site 'w'"]


def test_gradients_and_values_by_name():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad, self.dead = (nn.Parameter(torch.tensor(float(i))) for i in (1, 0, 2))

        def forward(self, y):
            pyro.sample("y", dist.Normal(self.good + self.bad.sqrt() * 0, 1.0), obs=y)

    root = Root()
    parameters = Parameters({"model": root})
    parameters.collect()
    root.dead.data.fill_(float("inf"))
    text = breakdown(parameters, ELBO(), root, lambda y: None, (torch.tensor(0.0),))
    assert "in a fresh run: no sample site." in text
    assert "non-finite gradient: model.bad; with a non-finite value: model.dead." in text
    assert "lower lr" in text
    assert "error.fit" in text
    assert all(tensor.grad is None for tensor in root.parameters())
