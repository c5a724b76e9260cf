"""The plot of draws of a function shows the quantiles that were given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import stochdyn as sd


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def shown(ax, label):
    """Lower and upper edge of a band at its points."""
    band = next(c for c in ax.collections if c.get_label() == label)
    points = band.get_paths()[0].vertices
    xs = np.unique(points[:, 0])
    return np.array([[points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()] for x in xs])


def test_bands_median_truth_and_prior():
    at = torch.linspace(0, 1, 7)
    draws = torch.randn(401, 7, 1, generator=torch.Generator().manual_seed(0)) + at[:, None]
    ax = sd.plot_function(at, draws, prior=5 * draws, truth=at, lines=5, labels=("z", "rate of z"))
    values = draws[..., 0].numpy()
    for label, width in (("95%", 0.95), ("80%", 0.8), ("50%", 0.5)):
        expected = np.quantile(values, [(1 - width) / 2, (1 + width) / 2], axis=0).T
        np.testing.assert_allclose(shown(ax, label), expected, atol=1e-6)
    np.testing.assert_allclose(
        shown(ax, "prior 95%"), 5 * np.quantile(values, [0.025, 0.975], axis=0).T, rtol=1e-5
    )
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["median"], np.median(values, 0), atol=1e-6)
    np.testing.assert_allclose(lines["truth"], at.numpy())
    assert len(ax.lines) == 5 + 2 + 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z", "rate of z")
    low, high = ax.get_ylim()
    assert high - low < 15  # the prior, 20 wide, does not hide the rest
    whole = sd.plot_function(at, draws, ax=plt.figure().gca()).get_ylim()
    assert whole[1] - whole[0] < high - low


def test_refused():
    at = torch.linspace(0, 1, 7)
    with pytest.raises(sd.ShapeError, match=r"`draws` has shape \(5, 6\), expected \(draw, point=7\)"):
        sd.plot_function(at, torch.zeros(5, 6))
    with pytest.raises(sd.ShapeError, match="`truth` has 3 points, `at` 7"):
        sd.plot_function(at, torch.zeros(5, 7), truth=torch.zeros(3))
    with pytest.raises(sd.DataError, match="`draws`: 2 draws, 1 not finite"):
        sd.plot_function(at, torch.tensor([[0.0], [torch.nan]]).expand(2, 7))
    with pytest.raises(sd.DataError, match="`prior`: 1 draws, 0 not finite"):
        sd.plot_function(at, torch.zeros(5, 7), prior=torch.zeros(1, 7))
