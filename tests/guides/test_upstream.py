"""What a head sees of the latents sampled before its site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from stochdyn.guides.plates import Place, key_of
from stochdyn.guides.upstream import (
    beside,
    for_path,
    for_series,
    group_frame,
    rows,
    seen_by_path,
    seen_by_series,
    series_frame,
    series_of,
)
from tests.hierarchies import simulated

BATCH = simulated(3, seed=0)
PART = BATCH[[4, 0]]


def model(batch):
    pyro.sample("nowhere", dist.Normal(0.0, 1.0))
    with batch.group_plate("site"):
        pyro.sample("group", dist.Normal(0.0, 1.0))
        with pyro.plate("kind", 2, dim=-2):
            pyro.sample("nested", dist.Normal(0.0, 1.0))
    with pyro.plate("other", 4):
        pyro.sample("elsewhere", dist.Normal(0.0, 1.0))
    with batch.plate("subject"):
        pyro.sample("local", dist.Normal(0.0, 1.0))
        with pyro.plate("arm", 2, dim=-2):
            pyro.sample("path", dist.Normal(0.0, 1.0))


def places(batch):
    nodes = poutine.trace(model).get_trace(batch).nodes
    nodes = {n: s for n, s in nodes.items() if s["type"] == "sample"}
    drawn = {n: s["value"] for n, s in nodes.items() if type(s["fn"]).__name__ == "_Subsample"}
    sites = {n: s for n, s in nodes.items() if n not in drawn}
    return {n: Place.of(n, tuple(s["cond_indep_stack"]), drawn) for n, s in sites.items()}


def test_who_sees_whom():
    for batch in (BATCH, PART):
        at = places(batch)
        assert [n for n in at if group_frame(at[n], batch)] == ["group"]
        assert [n for n in at if series_frame(at[n], batch)] == ["local", "path"]
        assert [n for n in at if seen_by_series(at[n], batch, "subject")] == ["nowhere", "group", "local"]
        assert [n for n in at if seen_by_series(at[n], batch, "site")] == ["nowhere", "group"]
        assert [n for n in at if seen_by_path(at[n], at["path"], batch)] == [
            "nowhere",
            "group",
            "local",
            "path",
        ]
        assert not seen_by_path(at["group"], at["path"], None)


def test_groups_are_read_at_the_members():
    at, value = places(PART), torch.tensor([[10.0], [11.0], [12.0]])
    assert for_path(value, at["group"], at["local"], PART).flatten().tolist() == [11, 10]
    assert for_series(value, at["group"], PART, population=False).flatten().tolist() == [11, 10]
    everyone = for_series(value, at["group"], PART, population=True)
    assert everyone.flatten().tolist() == [10] * 3 + [11] * 3 + [12] * 3
    local = torch.zeros(2, 1)
    assert for_path(local, at["local"], at["path"], PART) is local
    assert for_series(local, at["local"], PART, population=False).shape == (2, 1)
    particles = torch.zeros(7, 1, 4)
    assert for_series(particles, at["nowhere"], PART, population=True).shape == (7, 1, 4)
    assert for_series(torch.zeros(4), at["nowhere"], PART, population=True).shape == (4,)


def test_rows_bring_a_plate_to_the_last_dimension():
    value = torch.arange(6.0).reshape(3, 1, 2)
    assert torch.equal(rows(value, -2), value.transpose(0, 1))
    assert rows(value[:, 0], -2).shape == (3, 1, 2)
    assert rows(value, -2, torch.tensor([2, 2]))[0].tolist() == [[4, 5], [4, 5]]


def test_the_series_are_the_first_argument():
    assert series_of((BATCH, 1)) is BATCH
    assert series_of((1, BATCH)) is None
    assert series_of(()) is None


def test_keys_of_sites():
    assert key_of("a.b") == "a__b"
    assert key_of("keys") == "keys__"


def test_beside_broadcasts_the_batches():
    x, y = torch.randn(4, 3), torch.randn(5, 1, 2)
    both = beside(x, y)
    assert both.shape == (5, 4, 5)
    assert torch.equal(both[2, 1], torch.cat([x[1], y[2, 0]]))
    with pytest.raises(RuntimeError):
        beside(x, torch.randn(3, 2))
