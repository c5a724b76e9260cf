"""Encoders read the data and nothing else: not the padding, not the order, not what is masked."""

import pytest
import torch

import stochdyn as sd
from stochdyn.encoders import align
from stochdyn.errors import ShapeError

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rows(lengths=(5, 3, 7), channels=2):
    out = []
    for length in lengths:
        times = (0.1 + torch.rand(length, dtype=F64)).cumsum(0)
        out.append((times, torch.randn(length, channels, dtype=F64)))
    return out


def encoder(channels=2, **options):
    return sd.GRUEncoder(channels, hidden=6, **options).double()


def test_padding_changes_nothing():
    given, net = rows(), encoder()
    together = net(sd.Series.from_list(given))
    for i, row in enumerate(given):
        alone = net(sd.Series.from_list([row]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=1e-12)
    forwards = net.gru(net._inputs(sd.Series.from_list(given)).flip(1))[0].flip(1)
    assert (forwards - together)[1, :3].abs().max() > 1e-3  # a plain reversal would read the padding


def test_the_order_of_the_batch_changes_nothing():
    series, net = sd.Series.from_list(rows()), encoder()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(series[order]), net(series)[order], rtol=0, atol=1e-12)


def test_times_added_for_a_forecast_change_nothing_before_them():
    given, net = rows((4, 4)), encoder()
    series = sd.Series.from_list(given)
    ahead = series.extend([99.0])
    assert not ahead.mask[:, -1].any()
    valid = align(net(ahead), ahead, ahead.times)[2]
    assert valid[:, :4].all()
    assert not valid[:, 4].any()


def test_masked_values_have_no_influence():
    times, values = torch.linspace(0, 1, 4), torch.randn(2, 4, 2, dtype=F64)
    mask = torch.rand(2, 4, 2) > 0.4
    net = encoder()
    other = torch.where(mask, values, values + 7.0)
    a, b = (net(sd.Series(times, v, mask=mask)) for v in (values, other))
    assert torch.equal(a, b)
    c = net(sd.Series(times, torch.where(mask, values + 7.0, values), mask=mask))
    assert (a - c).abs().max() > 1e-3
    d = net(sd.Series(times, torch.where(mask, values, torch.zeros_like(values))))
    assert (a - d).abs().max() > 1e-3  # missing is not the same as zero


def test_gaps_have_influence():
    values, net = torch.randn(1, 4, 2, dtype=F64), encoder()
    a, b, c = (net(sd.Series(t, values)) for t in ([0, 1, 2, 3], [5, 6, 7, 8], [0, 1, 2, 5]))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # only differences of times count
    assert (a - c)[0, :3].abs().min() > 1e-6
    assert torch.equal(a[0, 3], c[0, 3])


def test_an_entry_reads_what_was_observed_from_its_time_on():
    values, net = torch.randn(1, 5, 2, dtype=F64), encoder()
    changed = values.clone()
    changed[:, 2] += 1
    a, b = (net(sd.Series(torch.arange(5.0), v)) for v in (values, changed))
    assert torch.equal(a[:, 3:], b[:, 3:])
    assert ((a - b)[:, :3].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("timed", [False, True])
def test_covariates_are_read(timed):
    shape = (2, 4, 3) if timed else (2, 3)
    covariates = torch.randn(shape, dtype=F64)
    values, net = torch.randn(2, 4, 2, dtype=F64), encoder(covariates=3)
    a, b = (net(sd.Series(torch.arange(4.0), values, covariates=c)) for c in (covariates, covariates + 1))
    assert (a - b).abs().min() > 1e-6
    with pytest.raises(ShapeError, match="made for 3 covariates, the batch has none"):
        net(sd.Series(torch.arange(4.0), values))


def test_the_transform_is_applied_to_observed_values():
    values = torch.rand(2, 4, 2, dtype=F64) * 100
    plain, logged = encoder(), encoder(transform=torch.log1p)
    logged.load_state_dict(plain.state_dict())
    a = logged(sd.Series(torch.arange(4.0), values))
    torch.testing.assert_close(a, plain(sd.Series(torch.arange(4.0), values.log1p())))


def test_another_number_of_channels_is_refused():
    with pytest.raises(ShapeError, match=r"made for 3 channels, the batch has 2.*obs_dim=2"):
        encoder(3)(sd.Series.from_list(rows()))


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
