"""Where the marginals of a guide have their knots, and what does not depend on the batch around a series."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import stochdyn as sd
from stochdyn.guides.marginals import KnotsOnly, MarginalSite, knots_of, numbers
from tests.programs import F64, ou, ou_path, ou_series

TIMES = torch.arange(6, dtype=F64) * 0.3


def knots(batch, **options):
    return knots_of(batch, ou_path(sd.TimeGrid(batch.times, substeps=5, **options).ts, 1.5, 0.5, 0.8))


def marginal(guide, batch):
    with torch.no_grad():
        return poutine.trace(KnotsOnly()(guide)).get_trace(batch).nodes["z"]["fn"]


class TestKnots:
    def test_at_what_is_observed(self):
        times, index, observed = knots(ou_series(2, TIMES, hold=[(0, 2), (0, 5)]))
        torch.testing.assert_close(times[0], TIMES[[0, 1, 3, 4, 4, 4]])
        torch.testing.assert_close(times[1], TIMES)
        assert index[0].tolist() == [0, 1, 3, 4, 4, 4]
        assert observed.tolist() == [[0, 1, 2, 2, 3, 3], [0, 1, 2, 3, 4, 5]]

    def test_a_start_before_the_first_observation_is_a_knot_of_that_series_only(self):
        """Two knots at one time would let the likelihood and the divergence of the start read different states."""
        times, index, observed = knots(ou_series(2, TIMES, hold=[(0, 0)]))
        torch.testing.assert_close(times, TIMES.expand(2, -1))
        assert index.tolist() == [[1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
        assert observed.tolist() == [[1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
        assert (times.diff(dim=-1) > 0).all()

    def test_a_start_before_all(self):
        times, index, observed = knots(ou_series(2, TIMES + 0.1), start=0.0)
        torch.testing.assert_close(times[0], torch.cat([torch.zeros(1, dtype=F64), TIMES + 0.1]))
        assert index[0].tolist() == [0, 0, 1, 2, 3, 4, 5]
        assert observed[0].tolist() == [1, 2, 3, 4, 5, 6]

    def test_one_observation_and_none(self):
        times, _, observed = knots(ou_series(2, TIMES, hold=[(i, k) for i in (0, 1) for k in range(i, 6)]))
        assert times.shape == (2, 2)
        assert observed.shape == (2, 6)
        assert int(observed.max()) < 2

    def test_they_do_not_depend_on_the_other_series(self):
        batch = ou_series(3, TIMES, hold=[(0, 0), (1, 3), (2, 0), (2, 1)])
        together = knots(batch)
        for i in range(3):
            alone = knots(batch[[i]])
            points = alone[0].shape[1]
            for one, all_ in zip(alone[:2], together[:2], strict=True):
                torch.testing.assert_close(one[0], all_[i, :points])
            torch.testing.assert_close(alone[2][0], together[2][i])


class TestInvariance:
    @pytest.mark.parametrize("hold", [[(0, 0)], [(1, 5), (1, 4)]])
    def test_of_an_encoded_posterior(self, hold):
        """Of a series alone and beside others, which have knots at other places and more of them."""
        batch = ou_series(3, TIMES, hold=hold)
        torch.manual_seed(0)
        guide = sd.AmortizedGuide(ou, sd.GRUEncoder(1, hidden=8).double(), paths=sd.Marginals(), hidden=8)
        together = marginal(guide, batch).knots
        for i in range(3):
            alone = marginal(guide, batch[[i]]).knots
            points = alone.times.shape[-1]
            torch.testing.assert_close(alone.loc[0], together.loc[i, :points])
            torch.testing.assert_close(alone.scale_tril[0], together.scale_tril[i, :points])
            torch.testing.assert_close(alone.slopes[0], together.slopes[i, : points - 1])
            torch.testing.assert_close(alone.coupling[0], together.coupling[i, : points - 1])

    def test_of_a_table_in_mini_batches(self):
        batch = ou_series(3, TIMES, hold=[(0, 0), (2, 4)])
        guide = sd.AmortizedGuide(ou, paths=sd.Marginals())
        sd.fit(ou, guide, batch, objective=sd.PathELBO(), steps=5, progress=False)
        together = marginal(guide.eval(), batch).knots
        for i in range(3):
            alone = marginal(guide, batch[[i]]).knots
            torch.testing.assert_close(alone.loc[0], together.loc[i, : alone.loc.shape[-2]])


class TestNumbers:
    def test_every_coupling_is_below_one(self):
        torch.manual_seed(0)
        site = MarginalSite(3, (torch.zeros(4, numbers(3)[0]), torch.zeros(3, numbers(3)[1])), None).double()
        knot, gap = (
            30 * torch.randn(2, 50, 4, numbers(3)[0], dtype=F64)[0],
            30 * torch.randn(50, 3, numbers(3)[1], dtype=F64),
        )
        K = site._knots(torch.arange(4, dtype=F64), knot, gap).coupling
        assert torch.linalg.matrix_norm(K, 2).max() < 1

    @pytest.mark.parametrize("encoder", [None, 8])
    def test_a_fresh_guide_loads_them(self, encoder):
        def new():
            encoded = None if encoder is None else sd.GRUEncoder(1, hidden=encoder).double()
            return sd.AmortizedGuide(ou, encoded, paths=sd.Marginals(), hidden=encoder or 64)

        batch, first, second = ou_series(2, TIMES), new(), new()
        sd.fit(ou, first, batch, objective=sd.PathELBO(), steps=3, progress=False)
        second.load_state_dict(first.state_dict())
        mine, theirs = marginal(first.eval(), batch).knots, marginal(second.eval(), batch).knots
        torch.testing.assert_close(mine.loc, theirs.loc)
        torch.testing.assert_close(mine.coupling, theirs.coupling)
        assert torch.equal(mine.loc, theirs.loc)


def test_float32():
    """The checksum of the data keeps its digits, so that a guide knows its own series again."""

    def model(batch):
        grid = sd.TimeGrid(batch.times, substeps=2, start=0.0)
        with batch.plate("series"):
            path = sd.SDEPath(lambda t, z: -z, torch.tensor([0.5, 0.3]), torch.ones(2), grid.ts)
            z = pyro.sample("z", path)
            pyro.sample(
                "y", dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2), obs=batch.values
            )

    torch.manual_seed(0)
    batch = sd.Series(TIMES + 0.2, torch.randn(3, 6, 2))
    guide, again = (sd.AmortizedGuide(model, paths=sd.Marginals()) for _ in range(2))
    fit = sd.fit(model, guide, batch, objective=sd.PathELBO(times=2), steps=20, lr=0.05, progress=False)
    assert fit.skipped == 0
    again.load_state_dict(guide.state_dict())
    for q in (marginal(guide.eval(), batch), marginal(again.eval(), batch)):
        assert q.knots.loc.dtype == torch.float32
        assert q.path_kl().dtype == torch.float32
        assert torch.equal(q.knots.loc, marginal(guide, batch).knots.loc)


def test_inside_and_outside():
    """The same guide gives marginals to `PathELBO`, and a path on the grid to all else."""
    batch = ou_series(2, TIMES)
    guide = sd.AmortizedGuide(ou, paths=sd.Marginals())
    assert guide(batch)["z"].shape == (2, 26, 1)
    assert isinstance(marginal(guide, batch), sd.MarginalPath)
    with KnotsOnly():
        assert guide(batch)["z"].shape == (2, 6, 1)


def test_without_a_series():
    def model():
        ts = torch.linspace(0, 1, 5, dtype=F64)
        pyro.sample("z", ou_path(ts, 1.5, 0.5, 0.8))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(sd.GuideError, match="needs a Series as the model's first argument"):
        sd.AmortizedGuide(model, paths=sd.Marginals())()
