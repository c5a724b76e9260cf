"""Which sites are local, several draws of those alone, and what cannot be weighed per series."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.errors import FitError
from stochdyn.inference.local import Layout, find_layout
from tests.programs import F64, local_theta, normal, ou_series, own_times

BATCH = ou_series(4, own_times(4, 5))
Y = torch.zeros(2, 3, dtype=F64)


def nested(y):
    level = pyro.sample("level", normal(0.0, 1.0))
    with pyro.plate("group", 2, dim=-2):
        centre = pyro.sample("centre", dist.Normal(level, 1.0))
        with pyro.plate("member", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def empty(*args):
    pass


def test_the_plate_over_the_series_is_found():
    assert find_layout(local_theta, sd.AmortizedGuide(local_theta), (BATCH,), None) == Layout("series", 1)
    assert find_layout(lambda: pyro.sample("z", normal(0.0, 1.0)), empty, (), None) == Layout(None, 0)


def test_randomness_is_left_alone():
    before = torch.get_rng_state()
    find_layout(nested, empty, (Y,), "member")
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_unclear_is_asked_for():
    with pytest.raises(FitError, match=r"stand in \{'y': \['group', 'member'\]\}.*Name it with plate="):
        find_layout(nested, empty, (Y,), None)
    with pytest.raises(FitError, match=r"plate='series': the model has the plates \['group', 'member'\]"):
        find_layout(nested, empty, (Y,), "series")

    def outside(batch):
        local_theta(batch)
        pyro.sample("all", normal(0.0, 1.0), obs=torch.tensor(0.1, dtype=F64))

    with pytest.raises(FitError, match="one plate must be around all of them"):
        find_layout(outside, empty, (BATCH,), None)


@pytest.mark.parametrize(
    ("plate", "shapes"),
    [
        ("member", {"level": (), "centre": (2, 1), "z": (5, 2, 3), "y": (5, 2, 3)}),
        ("group", {"level": (), "centre": (5, 2, 1), "z": (5, 2, 3), "y": (5, 2, 3)}),
    ],
)
def test_only_local_sites_are_drawn_several_times(plate, shapes):
    layout = find_layout(nested, empty, (Y,), plate)
    trace = layout.trace(nested, (Y,), 5)
    trace.compute_log_prob()
    found = {name: tuple(trace.nodes[name]["log_prob"].shape) for name in shapes}
    assert found == shapes
    units = layout.units(trace)
    assert tuple(units.total(layout.locals(trace)).shape) == ((5, 2, 3) if plate == "member" else (5, 2, 1))
    again = layout.trace(nested, (Y,), 5, trace)
    assert torch.equal(again.nodes["z"]["value"], trace.nodes["z"]["value"])
    single = poutine.trace(nested).get_trace(Y)
    assert single.nodes["z"]["value"].shape == (2, 3)


def test_scales_are_apart_from_log_densities():
    def model(scale=1.0):
        with pyro.plate("rows", 6, subsample=torch.tensor([0, 2])), poutine.scale(scale=scale):
            pyro.sample("y", normal(0.0, 1.0), obs=torch.tensor([1.0, 2.0], dtype=F64))

    layout = Layout("rows", 1)
    for scale in (1.0, 0.5):
        trace = layout.trace(model, (scale,), 3)
        trace.compute_log_prob()
        units = layout.units(trace)
        assert units.scale == 3.0
        expected = scale * normal(0.0, 1.0).log_prob(torch.tensor([1.0, 2.0], dtype=F64)).expand(3, 2)
        torch.testing.assert_close(units.total(layout.locals(trace)), expected)


def test_a_mini_batch_inside_a_unit_is_refused():
    def model():
        with pyro.plate("rows", 2, dim=-2):
            z = pyro.sample("z", normal(0.0, 1.0))
            with pyro.plate("times", 6, subsample=torch.tensor([0, 2]), dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(2, 2, dtype=F64))

    layout = find_layout(model, empty, (), "rows")
    with pytest.raises(FitError, match=r"plate \['times'\] is subsampled inside"):
        layout.units(layout.trace(model, (), 3))
