"""What a guide stores of a path: which data are its own, how the estimate follows, which messages it finds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.errors import GuideError
from stochdyn.guides.path_site import Head, PathSite
from stochdyn.guides.plates import Place
from tests.programs import F64, ou_path, ou_series, own_times

BATCH = ou_series(4, own_times(4, 3), hold=[(1, 1)])
TS = sd.TimeGrid(BATCH.times, substeps=2).ts


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def place_of(batch):
    with poutine.trace() as tracer, batch.plate("series"):
        pyro.sample("z", ou_path(TS[batch.index], 1.5, 0.5, 0.8))
    nodes = tracer.trace.nodes
    drawn = {n: s["value"] for n, s in nodes.items() if n != "z" and s["type"] == "sample"}
    return Place.of("z", tuple(nodes["z"]["cond_indep_stack"]), drawn), nodes["z"]["fn"]


PLACE, PRIOR = place_of(BATCH)


def site(message=None, features=None):
    return PathSite.begin(message or sd.FreeMessage(), PRIOR, PLACE, features, 5)


def remembered():
    s = site()
    around = torch.randn(4, 5, 1, dtype=F64)
    s.remember(TS, around, PLACE, s.signature_of((BATCH,), torch.Size((4,))))
    return s, around


def test_it_starts_with_a_row_per_member_and_the_priors_scale():
    s = site()
    assert s.numbers.shape == (4, 5, 2)
    assert s.plates == 1
    assert s.centre.item() == pytest.approx(0.5, abs=0.3)
    assert s.unit.item() == pytest.approx(0.46, abs=0.2)
    assert not s.seen.any()
    assert site(features=7).numbers is None


def test_the_head_starts_constant():
    start = torch.tensor([0.3, -0.1])
    head = Head(4, 8, 2).begin(start)
    torch.testing.assert_close(head(torch.randn(5, 4)), start.expand(5, 2))
    head(torch.randn(5, 4)).sum().backward()
    assert head[2].weight.grad.abs().min() > 0


def test_what_is_stored_is_found_again():
    s, around = remembered()
    signature = s.signature_of((BATCH,), torch.Size((4,)))
    assert torch.equal(s.stored(TS, PLACE, signature), around)
    index = torch.tensor([3, 1])
    part, _ = place_of(BATCH[index])
    assert torch.equal(s.stored(TS[index], part, signature[index]), around[index])
    assert s.stored(TS + 0.1, PLACE, signature) is None
    assert s.stored(TS, PLACE, signature + torch.tensor([0, 0, 0.1, 0])) is None
    longer = torch.cat([TS, TS[:, -1:] + 1], -1)
    assert s.stored(longer, PLACE, signature) is None


def test_signatures_tell_data_apart():
    s = site()

    def signature(batch):
        return s.signature_of((batch,), torch.Size((4,)))

    own = signature(BATCH)
    assert len(set(own.tolist())) == 4
    torch.testing.assert_close(signature(BATCH.extend([9.0])), own, rtol=1e-12, atol=0)
    for changed in (
        sd.Series(BATCH.times + 1, BATCH.values, mask=BATCH.mask),
        sd.Series(BATCH.times, BATCH.values + 1e-3 * BATCH.mask, mask=BATCH.mask),
        sd.Series(BATCH.times, BATCH.values.flip(1), mask=BATCH.mask.flip(1)),
        sd.Series(BATCH.times, BATCH.values),
    ):
        assert ((signature(changed) - own).abs()[1:2] > 1e-6).all()
    assert not s.signature_of((BATCH.values,), torch.Size((4,))).any()
    assert not s.signature_of((), torch.Size((4,))).any()


def test_the_estimate_follows_sampled_paths():
    s, around = remembered()
    particles = torch.randn(30, 4, 5, 1, dtype=F64)
    s.follow(particles, TS, PLACE, 0.5)
    torch.testing.assert_close(s.around, 0.5 * around + 0.5 * particles.mean(0))
    before = s.around.clone()
    s.follow(particles, TS + 1.0, PLACE, 0.5)  # another grid
    s.follow(particles * float("inf"), TS, PLACE, 0.5)
    assert torch.equal(s.around, before)


def test_numbers_are_looked_up_by_time():
    s, _ = remembered()
    signature = s.signature_of((BATCH,), torch.Size((4,)))
    with torch.no_grad():
        s.numbers[..., 0] = TS.float().double()
    numbers, valid = s.table_numbers(TS, PLACE, signature, learning=False)
    assert torch.equal(numbers, s.numbers)
    assert valid.all()
    between = 0.5 * (TS[:, :-1] + TS[:, 1:])
    later = torch.cat([TS[:, :1], between, TS[:, -1:] + 1.0], -1)
    numbers, valid = s.table_numbers(later, PLACE, signature, learning=False)
    torch.testing.assert_close(
        numbers[:, 1:5, 0], TS[:, 1:].float().double()
    )  # the next one that was learned
    assert valid[:, :-1].all()
    assert not valid[:, -1].any()  # none after the last


def test_other_data_are_refused_unless_learning():
    s, _ = remembered()
    other = s.signature_of((BATCH,), torch.Size((4,))) + torch.tensor([0.0, 0, 1, 0])
    s.table_numbers(TS, PLACE, other, learning=True)
    with pytest.raises(GuideError, match="path site 'z', series 2: .* other data"):
        s.table_numbers(TS, PLACE, other, learning=False)
    assert site().table_numbers(TS, PLACE, other, learning=False)[1].all()  # untrained: nothing to confuse
    with pytest.raises(GuideError, match="trained with an encoder"):
        site(features=7).table_numbers(TS, PLACE, other, learning=False)


def test_a_state_dict_tells_all_shapes():
    for s in (remembered()[0], site(features=7)):
        twin = PathSite.of_state(s.state_dict())
        twin.load_state_dict(s.state_dict())
        for name, value in s.state_dict().items():
            assert torch.equal(twin.state_dict()[name].nan_to_num(), value.nan_to_num())


def test_free_messages_that_never_saw_data_can_be_evaluated():
    batch = sd.Series([0.0, 0.5, 1.0], torch.zeros(4, 3, 1), dtype=F64)

    def model(batch):
        grid = sd.TimeGrid(batch.times)
        with batch.plate("series"):
            start = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
            z = pyro.sample("z", sd.SDEPath(lambda t, z: -z, torch.ones(1, dtype=F64), start, grid.ts))
            seen = dist.Normal(grid.observed(z), 0.1).mask(batch.mask).to_event(2)
            pyro.sample("y", seen, obs=batch.values)

    guide = sd.AmortizedGuide(model, paths=sd.FreeMessage()).eval()
    assert guide(batch)["z"].shape == (4, 11, 1)
