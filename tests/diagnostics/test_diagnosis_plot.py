import matplotlib as mpl
import numpy as np
import pytest

import stochdyn as sd
from stochdyn.diagnostics.coverage import Coverage
from stochdyn.diagnostics.diagnosis import Diagnosis, LatentUse
from stochdyn.diagnostics.weights import Estimate
from stochdyn.errors import ShapeError

mpl.use("Agg")


def found(**more):
    return Diagnosis((), ("Ada", "Bo"), 100, Estimate(-3.0, 0.1), **more)


def test_a_panel_for_each_thing_measured():
    gap = Estimate(np.array([0.1, 2.0]), np.array([0.1, 0.1]))
    cover = Coverage.of(("y",), [np.linspace(0, 1, 11)], how="seen")
    latents = (LatentUse("z", True, np.ones((2, 1)), np.ones((2, 1)), 1, 0, 0.0),)
    axes = sd.plot_diagnosis(found(gap_per_series=gap, latents=latents, coverage=cover))
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == ["gap per series", "what the data said", "coverage, optimistic"]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["Ada", "Bo"]
    assert [text.get_text() for text in axes[1].get_yticklabels()] == ["z"]
    bar = axes[1].patches[0]
    assert bar.get_width() == 1.0


def test_k_hat_where_there_is_no_gap_and_nothing_at_all():
    axes = sd.plot_diagnosis(found(k_hat_per_series=np.array([-np.inf, 0.3])))
    assert axes[0].get_title(loc="left") == "k-hat per series"
    assert np.asarray(axes[0].lines[0].get_ydata()).tolist() == [0.0, 0.3]
    assert len(sd.plot_diagnosis(found())) == 1


def test_axes_are_one_for_each_panel():
    mine = sd.plot_diagnosis(found())
    assert sd.plot_diagnosis(found(), axes=mine)[0] is mine[0]
    with pytest.raises(ShapeError):
        sd.plot_diagnosis(found(), axes=[*mine, *mine])
