"""Tables with a row per member of a plate, read at the members of a run."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from stochdyn.errors import GuideError
from stochdyn.guides.plates import Place


def places(model):
    with poutine.trace() as tracer:
        model()
    nodes = tracer.trace.nodes
    drawn = {n: s["value"] for n, s in nodes.items() if type(s["fn"]).__name__ == "_Subsample"}
    sites = {n: s for n, s in nodes.items() if s["type"] == "sample" and n not in drawn}
    return {n: Place.of(n, tuple(s["cond_indep_stack"]), drawn) for n, s in sites.items()}


def model():
    pyro.sample("nowhere", dist.Normal(0.0, 1.0))
    rows, columns = (
        pyro.plate("row", 4, subsample=torch.tensor([2, 0]), dim=-2),
        pyro.plate("column", 3, dim=-1),
    )
    with rows:
        pyro.sample("r", dist.Normal(0.0, 1.0))
        with columns:
            pyro.sample("rc", dist.Normal(0.0, 1.0))
    with columns:
        pyro.sample("c", dist.Normal(0.0, 1.0))


def test_tables_are_as_large_as_the_plates():
    at = places(model)
    assert at["nowhere"].table_shape(torch.Size()) == ()
    assert at["r"].table_shape(torch.Size((2, 1))) == (4, 1)
    assert at["rc"].table_shape(torch.Size((2, 3))) == (4, 3)
    assert at["c"].table_shape(torch.Size((3,))) == (3,)
    assert at["rc"].sizes() == {"row": 4, "column": 3}


def test_take_and_put():
    place = places(model)["rc"]
    table = torch.arange(24.0).reshape(4, 3, 2)
    taken = place.take(table, 1)
    torch.testing.assert_close(taken, table[torch.tensor([2, 0])])
    place.put(table, -taken, 1)
    assert (table[[0, 2]] <= 0).all()
    assert (table[[1, 3]] > 0).all()
    whole = places(model)["c"]
    row = torch.arange(3.0)
    assert whole.take(row, 0) is row
    whole.put(row, torch.zeros(3), 0)
    assert not row.any()


def test_a_table_takes_gradients_for_its_members_only():
    place = places(model)["r"]
    table = torch.zeros(4, 1, 5, requires_grad=True)
    place.take(table, 1).sum().backward()
    assert table.grad[..., 0].flatten().tolist() == [1, 0, 1, 0]


def test_which_tables_fit():
    place = places(model)["rc"]
    assert place.fits(torch.zeros(4, 3, 2), 1)
    assert not place.fits(torch.zeros(2, 3, 2), 1)
    assert not place.fits(torch.zeros(4, 4, 2), 1)
    assert places(model)["nowhere"].fits(torch.zeros(2), 1)


def test_which_places_lie_within_others():
    at = places(model)
    assert at["r"].within(at["rc"])
    assert at["nowhere"].within(at["c"])
    assert not at["r"].within(at["c"])
    assert not at["rc"].within(at["r"])


def test_a_shuffled_whole_plate_keeps_its_order():
    def shuffled():
        with pyro.plate("row", 3, subsample=torch.tensor([1, 2, 0])):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    place = places(shuffled)["x"]
    assert place.take(torch.arange(3), 0).tolist() == [1, 2, 0]


def test_members_must_be_known():
    outside = pyro.plate("row", 4, subsample=torch.tensor([2, 0]))

    def inner():
        with outside:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(GuideError, match=r"site 'x': plate 'row' holds 2 of 4 members.*made outside"):
        places(inner)
