"""How encoders read a `Series`, shared by all: what the contract cannot say of a single one."""

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.encoders import AbstractBackwardEncoder, align
from stochdyn.errors import ShapeError, TimeError
from stochdyn.testing import check_encoder
from tests.programs import elbos, mean_and_error, ou, ou_evidence, ou_series, own_times

F64 = torch.float64
KINDS = [
    sd.GRUEncoder,
    sd.ODERNNEncoder,
    sd.SetEncoder,
    sd.ConvEncoder,
    sd.AntisymmetricEncoder,
    sd.OrthogonalEncoder,
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Reads(AbstractBackwardEncoder):
    """Returns its rows: the inputs, the gap, the time to the last observed one."""

    def __init__(self, **options):
        super().__init__(2, 6, **options)
        self.one = torch.nn.Parameter(torch.ones(()))

    def encode(self, rows):
        return self.one * torch.cat([rows.stepped, rows.elapsed[..., None]], -1)


def holes():
    mask = torch.tensor([[[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]], [[0, 0], [1, 1], [1, 1], [0, 1], [1, 1]]])
    values = torch.arange(20.0, dtype=F64).reshape(2, 5, 2)
    times = torch.tensor([[0, 1, 3, 6, 9], [1, 2, 4, 5, 9]], dtype=F64)
    return sd.Series(times, values, mask=mask.bool())


def test_the_rows_are_the_observed_times_backwards():
    out = Reads(time_unit=2.0).double()(holes())
    assert out[0].tolist() == [
        [0, 1, 1, 1, 1.5, 3],
        [4, 0, 1, 0, 1.5, 1.5],  # nothing was observed here: the entry of the next observed time
        [4, 0, 1, 0, 1.5, 1.5],
        [6, 7, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],  # nothing follows
    ]
    assert out[1, :, 4].tolist() == [1, 1, 0.5, 2, 0]
    assert out[1, :, 5].tolist() == [3.5, 3.5, 2.5, 2, 0]


def test_times_observed_throughout_take_the_short_way_to_the_same():
    batch = ou_series(3, own_times(3, 6))
    batch = sd.Series(batch.times, batch.values.expand(-1, -1, 2))
    net = Reads().double()
    short, ahead = net(batch), batch.extend([99.0])
    assert torch.equal(net(ahead)[:, :6], short)
    assert not net(ahead)[:, 6].any()


def test_gaps_of_large_times_keep_their_digits():
    times = 1.7e9 + torch.tensor([0.0, 100.0, 300.0], dtype=F64)
    batch = sd.Series(times, torch.ones(1, 3, 2, dtype=F64))
    out = Reads(time_unit=100.0)(batch)
    assert out.dtype == torch.float32
    assert out[0, :, 4:].tolist() == [[1, 3], [2, 2], [0, 0]]


@pytest.mark.parametrize("timed", [False, True])
def test_covariates_stand_behind_the_mask(timed):
    covariates = torch.randn((2, 4, 3) if timed else (2, 3), dtype=F64)
    out = Reads(covariates=3).double()(
        sd.Series(torch.arange(4.0), torch.ones(2, 4, 2), covariates=covariates)
    )
    expected = covariates if timed else covariates[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(out[..., 4:7], expected)


@every_kind
@pytest.mark.parametrize("covariates", [0, 3])
def test_ours_keep_the_contract(kind, covariates):
    check_encoder(kind(2, 6, covariates=covariates), covariates=covariates)
    check_encoder(kind(1, 5, covariates=covariates, time_unit=0.5), channels=1, covariates=covariates)


@every_kind
def test_only_differences_of_times_count(kind):
    values, net = torch.randn(1, 4, 2, dtype=F64), kind(2, 6).double()
    a, b = (net(sd.Series([0.0 + s, 1.0 + s, 3.0 + s, 3.5 + s], values)) for s in (0.0, 5.0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_kind
def test_the_time_unit_scales_times(kind):
    values, net, other = (
        torch.randn(1, 4, 2, dtype=F64),
        kind(2, 6).double(),
        kind(2, 6, time_unit=60.0).double(),
    )
    other.load_state_dict(net.state_dict())
    times = torch.tensor([0.0, 1.0, 3.0, 3.5], dtype=F64)
    torch.testing.assert_close(net(sd.Series(times, values)), other(sd.Series(60 * times, values)))


@every_kind
def test_the_transform_is_applied_to_observed_values(kind):
    values = torch.rand(2, 4, 2, dtype=F64) * 100
    plain, logged = kind(2, 6).double(), kind(2, 6, transform=torch.log1p).double()
    logged.load_state_dict(plain.state_dict())
    a = logged(sd.Series(torch.arange(4.0), values))
    torch.testing.assert_close(a, plain(sd.Series(torch.arange(4.0), values.log1p())))
    mask = torch.rand(2, 4, 2) > 0.3
    negative = torch.where(mask, values, torch.full_like(values, -5))  # log1p gives NaN there
    assert torch.isfinite(logged(sd.Series(torch.arange(4.0), negative, mask=mask))).all()


@every_kind
def test_what_does_not_fit_is_refused(kind):
    batch = sd.Series(torch.arange(4.0), torch.randn(2, 4, 2), covariates=torch.randn(2, 1))
    name = kind.__name__
    with pytest.raises(ShapeError, match=rf"{name} was made for 3 channels, the batch has 2.*obs_dim=2"):
        kind(3, 6)(batch)
    with pytest.raises(ShapeError, match=rf"{name} was made for 3 covariates, the batch has 1"):
        kind(2, 6, covariates=3)(batch)
    with pytest.raises(ShapeError, match=rf"{name} was made for 3 covariates, the batch has none"):
        kind(2, 6, covariates=3)(sd.Series(torch.arange(4.0), torch.randn(2, 4, 2)))
    with pytest.raises(ShapeError, match=rf"{name}: channels and hidden must be at least 1"):
        kind(2, 0)
    with pytest.raises(TimeError, match=rf"{name}: `time_unit` must be positive, got 0"):
        kind(2, 6, time_unit=0)


@every_kind
def test_inside_a_guide_training_raises_the_elbo(kind):
    batch = ou_series(20, own_times(20, 6), hold=[(0, 1), (3, 5)])
    guide = sd.AmortizedGuide(ou, kind(1, 16).double(), paths=sd.FreeMessage())
    before, early = [p.clone() for p in guide.encoder.parameters()], elbos(ou, guide, batch)
    sd.fit(ou, guide, batch, steps=40, lr=sd.Constant(0.01), progress=False)
    (a, a_error), (b, b_error) = mean_and_error(early), mean_and_error(elbos(ou, guide, batch))
    assert b - a > 4 * math.hypot(a_error, b_error)
    assert b < ou_evidence(batch).sum() + 4 * b_error
    assert not any(torch.equal(p, q) for p, q in zip(before, guide.encoder.parameters(), strict=True))


def test_align_finds_the_next_observation():
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])[..., None]
    times = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 2.0, 2.5]], dtype=F64)
    batch = sd.Series(times, torch.zeros(2, 4, 1, dtype=F64), mask=mask)
    encoding = torch.arange(8.0, dtype=F64).reshape(2, 4, 1)
    grid = sd.TimeGrid(times, substeps=2)
    picked, ahead, valid = align(encoding, batch, grid.ts)
    assert picked[..., 0].tolist() == [[0, 2, 2, 2, 2, 3, 3], [5, 5, 5, 6, 6, 7, 7]]
    assert valid.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    assert ahead.tolist() == [[0, 1.5, 1, 0.5, 0, 0, 0], [0.5, 0.25, 0, 0.75, 0, 0.25, 0]]


def test_align_reads_a_shared_grid():
    batch = sd.Series([0.0, 1.0], torch.zeros(3, 2, 1))
    picked, ahead, valid = align(torch.ones(3, 2, 4), batch, torch.tensor([0.0, 0.5, 1.0]).double())
    assert picked.shape == (3, 3, 4)
    assert ahead[0].tolist() == [0, 0.5, 0]
    assert valid.all()


def test_align_says_that_nothing_follows_times_added_for_a_forecast():
    ahead = ou_series(2, own_times(2, 4)).extend([99.0])
    valid = align(sd.GRUEncoder(1, 4).double()(ahead), ahead, ahead.times)[2]
    assert valid[:, :4].all()
    assert not valid[:, 4].any()
