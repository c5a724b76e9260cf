"""When a path jumped: read off models that observe it, by gap, and drawn."""

import math

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt

import stochdyn as sd
from stochdyn.diagnostics.jumps import JumpReading, _gaps, plot_jumps, read_jumps

F64 = torch.float64


@pytest.fixture(autouse=True)
def _close():
    pyro.clear_param_store()
    yield
    plt.close("all")


Y = torch.tensor([[0.0, 0.1, 5.0, 5.1], [1.0, 0.8, 0.9, -4.0]], dtype=F64)[..., None]


def observed(batch, site="y"):
    """The path itself is observed, with known parameters but for a level that changes nothing."""
    pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    jumps = sd.CompoundPoisson(0.1, sd.NormalJump(0.0, 4.0))
    with batch.plate("series"):
        path = sd.JumpDiffusionPath(
            lambda t, z: 0 * z, torch.tensor([0.3], dtype=F64), jumps, batch.values[:, 0], batch.times
        )
        pyro.sample(site, path, obs=batch.values)


def test_a_path_that_is_observed_is_read_exactly():
    series = sd.Series(torch.arange(4.0, dtype=F64), Y)
    reading = read_jumps((observed, sd.AmortizedGuide(observed)), series, draws=3)
    moved = Y[:, 1:, 0].numpy() - Y[:, :-1, 0].numpy()
    weights = [
        math.exp(-0.1) * 0.1**n / math.factorial(n)
        * np.exp(-0.5 * moved**2 / (0.09 + 16 * n)) / np.sqrt(0.09 + 16 * n)
        for n in range(12)
    ]  # fmt: skip
    share = np.array(weights) / np.sum(weights, 0)
    np.testing.assert_allclose(reading.probability, 1 - share[0], atol=1e-10)
    sizes = sum(share[n] * 16 * n / (0.09 + 16 * n) * moved for n in range(12))
    np.testing.assert_allclose(reading.size[..., 0], sizes, atol=1e-9)
    np.testing.assert_allclose(reading.size_if_jumped[0, 1, 0], sizes[0, 1] / (1 - share[0][0, 1]), atol=1e-9)
    assert reading.starts.tolist() == [[0, 1, 2], [0, 1, 2]] and reading.site == "y"


def test_steps_belong_to_the_gap_they_begin_in():
    series = sd.Series(torch.tensor([0.0, 1.0, 3.0]), torch.zeros(1, 3, 1))
    gap, inside, edges = _gaps(torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 3.5]), series)
    assert gap.tolist() == [[0, 0, 1, 1, 1]] and inside.tolist() == [[1, 1, 1, 1, 0]]
    assert edges.tolist() == [[0, 1, 3]]


def test_a_time_with_nothing_observed_is_no_edge():
    mask = torch.tensor([[True, False, True, False]])[..., None]
    series = sd.Series(torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.zeros(1, 4, 1), mask)
    gap, inside, edges = _gaps(torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 3.5]), series)
    assert edges.tolist() == [[0, 3, 3, 3]]
    assert gap.tolist()[0][:4] == [0, 0, 0, 0] and inside.tolist() == [[1, 1, 1, 1, 0]]


def test_a_forecast_of_a_path_that_is_observed_is_refused():
    series = sd.Series(torch.arange(4.0, dtype=F64), Y)
    guide = sd.AmortizedGuide(observed)
    guide(series)
    with pytest.raises(sd.GuideError, match="site 'y' is a path that is observed itself"):
        sd.predict((observed, guide), series, ts=[5.0], draws=3)
    holes = sd.Series(torch.arange(4.0, dtype=F64), Y, torch.arange(4).ne(2)[None, :, None].expand(2, 4, 1))
    with pytest.raises(
        sd.GuideError, match="A path with missing values, or .* is latent: sample it on a TimeGrid"
    ):
        sd.AmortizedGuide(observed)(holes)


def test_a_model_without_jumps_or_with_two_is_named():
    series = sd.Series(torch.arange(4.0, dtype=F64), Y)

    def none(batch):
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        with batch.plate("series"):
            seen = dist.Normal(level[..., None, None] + 0 * batch.values, 1.0)
            pyro.sample("y", seen.to_event(2), obs=batch.values)

    with pytest.raises(sd.FieldError, match=r"none of the model's sites \['level', 'y'\]"):
        read_jumps((none, sd.AmortizedGuide(none)), series)

    def two(batch):
        observed(batch, "a")
        jumps = sd.CompoundPoisson(0.1, sd.NormalJump(0.0, 4.0))
        scale = torch.tensor([0.3], dtype=F64)
        path = sd.JumpDiffusionPath(lambda t, z: 0 * z, scale, jumps, batch.values[:, 0], batch.times)
        pyro.sample("b", path.to_event(1), obs=batch.values)

    with pytest.raises(sd.FieldError, match=r"several of .* jump diffusions are \['a', 'b'\]"):
        read_jumps((two, sd.AmortizedGuide(two)), series)
    assert read_jumps((two, sd.AmortizedGuide(two)), series, site="b", draws=2).site == "b"


def reading():
    data = sd.Series(torch.arange(4.0), Y.float(), channels=["price"])
    t = np.arange(4.0)[None].repeat(2, 0)
    p = np.array([[0.0, 1.0, 0.1], [0.2, 0.3, 0.9]])
    return JumpReading(
        t[:, :-1], t[:, 1:], p, p[..., None] * [[[4.9], [4.9], [4.9]], [[0.1], [0.1], [-4.9]]], data, "z"
    )


def test_the_plot_shows_probabilities_and_marks_the_likely_gaps():
    top, bottom = plot_jumps(reading(), series=1, time_label="day")
    heights = [bar.get_height() for bar in bottom.patches]
    assert heights == [0.2, 0.3, 0.9] and bottom.get_xlabel() == "day" and top.get_ylabel() == "price"
    assert [text.get_text() for text in top.texts] == ["-4.9"]
    assert len(plot_jumps(reading(), series=1, threshold=0.25)[0].texts) == 2
    _, axes = plt.subplots(2)
    assert list(plot_jumps(reading(), axes=axes, channel="price")) == list(axes)


def test_faults_of_the_plot():
    with pytest.raises(sd.DataError, match="series 2 does not exist: there are 2"):
        plot_jumps(reading(), series=2)
    with pytest.raises(sd.DataError, match="channel 'volume' does not exist"):
        plot_jumps(reading(), channel="volume")
    with pytest.raises(sd.ShapeError, match="axes for 2 panels"):
        plot_jumps(reading(), axes=plt.subplots(1)[1])
