"""The messengers that run a model as its own guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import stochdyn as sd
from stochdyn.guides.passes import (
    AsGuide,
    Given,
    PathReached,
    PathsWithoutNoise,
    Run,
    emit_parameters,
    likeliest,
    observed_sites,
    own_randomness,
    prior_mode,
)
from tests.programs import F64, normal, ou, ou_path, ou_series

BATCH = ou_series(2, torch.linspace(0, 1, 4))


def model():
    a = pyro.sample("a", normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * a)
    b = pyro.sample("b", normal(a, 1.0))
    pyro.sample("y", normal(b, 1.0), obs=torch.tensor(1.0, dtype=F64))
    pyro.factor("extra", torch.tensor(3.0))


def posterior(name, prior, place, run):
    return dist.Delta(torch.tensor(5.0, dtype=F64))


def test_as_guide_replaces_latents_and_hides_the_rest():
    run, seen = Run((), {}), []
    with poutine.trace() as tracer, AsGuide(run, posterior, lambda name, *_: seen.append(name)):
        model()
    assert [n for n, s in tracer.trace.nodes.items() if s["type"] == "sample"] == ["a", "b"]
    assert run.values == {"a": 5.0, "b": 5.0}
    assert seen == ["a", "b"]


def test_a_second_run_repeats_values_without_new_sites():
    run = Run((), {})

    def stops(name, prior, place, run):
        if name == "b" and "b" not in run.potentials:
            raise PathReached(name, prior, place)
        return dist.Normal(torch.tensor(0.0, dtype=F64), 1.0)

    with poutine.trace() as tracer:
        try:
            with AsGuide(run, stops, lambda *_: None):
                model()
        except PathReached as reached:
            run.potentials[reached.name] = None
        first = run.values["a"]
        with AsGuide(run, stops, lambda *_: None):
            model()
    assert run.values["a"] is first
    assert [n for n, s in tracer.trace.nodes.items() if s["type"] == "sample"] == ["a", "b"]


def test_leaving_at_a_path_is_not_swallowed_by_the_model():
    def careful():
        try:
            pyro.sample("a", normal(0.0, 1.0))
        except Exception:
            raise AssertionError("swallowed") from None

    def stops(name, prior, place, run):
        raise PathReached(name, prior, place)

    reached = None
    try:
        with AsGuide(Run((), {}), stops, lambda *_: None):
            careful()
    except PathReached as error:
        reached = error.name
    assert reached == "a"


def test_given_holds_what_is_sampled_and_medians_for_the_rest():
    run = Run((), {})
    given = Given(run, {"a": torch.tensor(2.0, dtype=F64)}, lambda *_: torch.tensor(7.0, dtype=F64))
    with poutine.trace() as outside:
        sites = observed_sites(model, run, given)
    assert not outside.trace.nodes
    assert [s["name"] for s in sites] == ["y", "extra"]
    assert sites[0]["fn"].loc == 7.0


def test_the_likeliest_value_of_discrete_latents():
    fn = dist.Categorical(torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]))
    assert likeliest(fn).tolist() == [1, 0]
    assert likeliest(dist.Bernoulli(torch.tensor([0.3, 0.8]))).tolist() == [0, 1]
    one_hot = dist.OneHotCategorical(torch.tensor([[0.2, 0.7, 0.1]]))
    assert likeliest(one_hot).tolist() == [[0, 1, 0]]


def test_paths_without_noise():
    with poutine.trace() as tracer, PathsWithoutNoise():
        ou(BATCH)
    z = tracer.trace.nodes["z"]["value"]
    assert z.shape == (2, 16, 1)
    torch.testing.assert_close(z, torch.full_like(z, 0.5))


def test_the_mode_of_a_path_follows_its_messages():
    ts = torch.linspace(0, 1, 11, dtype=F64)
    path = ou_path(ts, 1.0, 0.0, 1.0)
    assert not prior_mode(path).any()
    strong = prior_mode(
        path, sd.Message.at(torch.ones(11, 1, dtype=F64), torch.full((11, 1), 1e6, dtype=F64))
    )
    torch.testing.assert_close(strong, torch.ones(11, 1, dtype=F64), atol=1e-3, rtol=0)


def test_leading_dimensions_are_particles():
    run = Run((), {})
    assert run.leading(1) == ()
    run.batch_shapes = {"a": torch.Size((4,)), "b": torch.Size((7, 1)), "c": torch.Size((5, 1, 4))}
    assert run.leading(1) == (5, 7)
    assert run.leading(2) == (5,)
    assert run.leading(3) == ()


def test_own_randomness_leaves_the_state():
    state = torch.get_rng_state()
    with own_randomness():
        torch.randn(5)
    assert torch.equal(state, torch.get_rng_state())


def test_parameters_are_told_without_the_store():
    pyro.clear_param_store()
    net = nn.Linear(2, 1)
    with poutine.trace(param_only=True) as tracer:
        emit_parameters(net, "here")
    nodes = tracer.trace.nodes
    assert set(nodes) == {"here.weight", "here.bias"}
    assert nodes["here.weight"]["value"].unconstrained() is net.weight
    assert not list(pyro.get_param_store().keys())


def _observing(batch, masked):
    grid = sd.TimeGrid(batch.times)
    with batch.plate("series"):
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.ones(1), start, grid.ts))
        seen = dist.Normal(grid.observed(z), 0.1)
        seen = seen.mask(batch.mask) if masked else seen
        pyro.sample("y", seen.to_event(2), obs=batch.values)


def test_missing_values_without_a_mask_are_refused():
    batch = sd.Series([0.0, 1.0], torch.zeros(2, 2, 1), mask=torch.tensor([[True, False], [True, True]]))
    with pytest.raises(
        sd.GuideError, match="site 'y' observes batch.values, of which 1 are missing, without a mask"
    ):
        sd.AmortizedGuide(_observing)(batch, False)
    assert "z" in sd.AmortizedGuide(_observing)(batch, True)
    full = sd.Series([0.0, 1.0], torch.zeros(2, 2, 1))
    assert "z" in sd.AmortizedGuide(_observing)(full, False)


def test_an_exploding_prior_is_named_at_the_first_call():
    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            path = sd.SDEPath(lambda t, z: (50 * z * z).exp(), torch.ones(1), torch.ones(1), grid.ts)
            z = pyro.sample("z", path)
            pyro.sample("y", dist.Normal(grid.observed(z), 0.1).to_event(2), obs=batch.values)

    with pytest.raises(sd.DivergedError, match=r"series 0, time .*the path is not finite"):
        sd.AmortizedGuide(model)(sd.Series([0.0, 1.0], torch.zeros(1, 2, 1)))
