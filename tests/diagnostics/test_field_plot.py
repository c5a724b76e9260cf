"""What the plots of fields show, read back from the figure."""

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt

import stochdyn as sd

F64 = torch.float64


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def line(draws=40):
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 61, dtype=F64)[:, None]
    slope = 1 + 0.1 * torch.randn(draws, 1, 1, dtype=F64)
    states = (0.5 * torch.randn(draws, 30, 1, dtype=F64)).clamp(-1, 1)
    return sd.FieldReading(x, slope * (x - x**3), 0.3 + 0.01 * slope + 0 * x, states, (0,), (61,))


def plane():
    torch.manual_seed(0)
    side = torch.linspace(-2, 2, 21, dtype=F64)
    points = torch.cartesian_prod(side, side)
    f = torch.stack([-points[:, 1], points[:, 0]], -1).expand(5, -1, -1)
    return sd.FieldReading(points, f, 0 * f + 0.1, 0.3 * torch.randn(5, 40, 2, dtype=F64), (0, 1), (21, 21))


def drawn(ax):
    """Rendering must not warn either."""
    ax.figure.canvas.draw()
    return ax


def test_a_line_has_median_bands_truth_and_faded_ends():
    reading = line()
    top, bottom = sd.plot_field(reading, drift=lambda z: z - z**3, names=["x"])
    drawn(top)
    lines = {part.get_label(): part for part in top.lines}
    assert np.allclose(lines["median"].get_ydata(), np.median(reading.drift[..., 0], 0))
    assert np.allclose(lines["truth"].get_ydata(), (reading.points - reading.points**3)[:, 0])
    assert "truth" not in {part.get_label() for part in bottom.lines}
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == (
        "drift of x",
        "diffusion of x",
        "x",
    )
    high = np.quantile(reading.states, 0.99)
    spans = sorted(p.get_extents().transformed(top.transData.inverted()).x0 for p in top.patches[:2])
    assert spans == pytest.approx([-2.0, high])
    band = top.collections[0].get_paths()[0].vertices[:, 1]
    outer = np.quantile(reading.drift[:, 0, 0], [0.025, 0.975])
    assert min(band) <= outer[0] and max(band) >= outer[1]
    assert [t.get_text() for t in top.texts] == ["no data", "no data"]


def test_one_draw_has_no_bands_and_states_outside_the_points_are_left_out():
    reading = replace(line(draws=1), states=10 * line().states)
    _, bottom = sd.plot_field(reading)
    assert {part.get_label() for part in bottom.lines} == {"learned"}
    bars = bottom.containers[0].patches
    assert min(bar.get_x() for bar in bars) >= -2 and max(bar.get_x() + bar.get_width() for bar in bars) <= 2
    assert next(-2 < text.get_position()[0] < 2 for text in bottom.texts if text.get_text() == "states")
    assert not bottom.collections and sd.plot_field(line())[1].collections
    # The control: all states are drawn where the points reach them.
    bars = sd.plot_field(line())[1].containers[0].patches
    assert len(bars) == 40 and max(bar.get_x() for bar in bars) < 1


def test_a_plane_streams_and_fades_where_no_state_is_near():
    ax = sd.plot_field(plane(), names=["x", "v"])[0]
    drawn(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "v")
    alpha = ax.images[0].get_array()[..., 3]
    assert alpha[50, 50] == 0
    assert alpha[0, 0] == pytest.approx(0.8)
    assert ax.get_xlim() == (-2, 2)


def test_a_plane_of_some_states_shows_those():
    reading = plane()
    wide = (
        torch.cat([reading.points, torch.zeros(441, 1)], -1),
        *(torch.cat([x, x[..., :1]], -1) for x in (reading.drift, reading.diffusion, reading.states)),
    )
    turned = [x[..., [2, 0, 1]] for x in wide]
    ax = sd.plot_field(sd.FieldReading(*turned, (1, 2), (21, 21)))[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("state 1", "state 2")


def test_fixed_points_are_marked_by_kind():
    found = sd.fixed_points(lambda t, z: z - z**3, torch.linspace(-2, 2, 9, dtype=F64)[:, None])
    ax = sd.plot_fixed_points(found, sd.plot_field(line())[0])
    drawn(ax)
    marks = [part for part in ax.lines if part.get_marker() == "o"]
    assert [float(part.get_xdata()[0]) for part in marks] == pytest.approx([-1, 0, 1], abs=1e-9)
    assert [part.get_markerfacecolor() == "white" for part in marks] == [False, True, False]
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts.count("stable node") == texts.count("unstable node") == 1


def test_a_saddle_is_a_cross_and_what_is_out_of_view_is_left_out():
    points = torch.rand(40, 2, dtype=F64, generator=torch.manual_seed(0)) * 8 - 2
    found = sd.fixed_points(lambda t, z: torch.stack([z[..., 0] * (5 - z[..., 0]), -z[..., 1]], -1), points)
    assert {p.kind for p in found.points} == {"saddle", "stable node"}
    ax = drawn(sd.plot_fixed_points(found, sd.plot_field(plane())[0]))
    assert [part.get_marker() for part in ax.lines if part.get_marker() in "oX"] == ["X"]
    empty = sd.fixed_points(lambda t, z: 1 + z**2, points)
    assert sd.plot_fixed_points(empty, ax) is ax


def test_on_a_phase_plane():
    _, ax = plt.subplots()
    ax.set(xlim=(-1, 6), ylim=(-1, 1))
    p = torch.tensor([4.5, 5.0, 5.5], dtype=F64)
    found = sd.fixed_points(
        lambda t, z: torch.stack([p - z[..., 0], -z[..., 1]], -1), torch.randn(9, 3, 2, dtype=F64) * 3
    )
    drawn(sd.plot_fixed_points(found, ax))
    assert len(ax.lines) == 2  # a bar or cloud of the draws, and the mark


def test_refuses():
    reading = line()
    with pytest.raises(sd.DataError, match="points of your own"):
        sd.plot_field(
            sd.FieldReading(reading.points, reading.drift, reading.diffusion, reading.states, (0,), None)
        )
    with pytest.raises(sd.DataError, match="not finite"):
        sd.plot_field(
            sd.FieldReading(reading.points, reading.drift / 0, reading.diffusion, reading.states, (0,), (61,))
        )
    with pytest.raises(sd.ShapeError, match="2 names for 1 states"):
        sd.plot_field(reading, names=["a", "b"])
    found = sd.fixed_points(lambda t, z: -z, reading.points)
    with pytest.raises(sd.ShapeError, match="one or two of the 1 states"):
        sd.plot_fixed_points(found, sd.plot_field(reading)[0], dims=[1])
