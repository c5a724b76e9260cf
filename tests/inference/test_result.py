"""The record of a fit."""

import math

from stochdyn.inference.result import Fit


def test_elbo_is_the_mean_of_the_last_tenth():
    losses = [float(i) for i in range(40)]
    fit = Fit(None, None, losses=losses, kl_weights=[1.0] * 40, population=5)
    assert fit.elbo == -(36 + 37 + 38 + 39) / 4
    assert fit.elbo_per_series == fit.elbo / 5


def test_at_least_one_step_counts():
    assert Fit(None, None, losses=[3.0, 2.0], kl_weights=[1.0, 1.0]).elbo == -2.0


def test_only_steps_of_weight_one_count_if_there_are_any():
    losses = [float(i) for i in range(30)]
    ramp = [0.5] * 28 + [1.0] * 2
    assert Fit(None, None, losses=losses, kl_weights=ramp).elbo == -28.5
    assert Fit(None, None, losses=losses, kl_weights=[0.5] * 30).elbo == -28.0


def test_without_steps():
    assert math.isnan(Fit(None, None).elbo)
    assert repr(Fit(None, None)) == "Fit: 0 steps in 0.0 s, ELBO nan"


def test_repr_tells_what_happened():
    fit = Fit(None, None, losses=[4.0], kl_weights=[1.0], step=3, skipped=2, interrupted=True, seconds=1.26)
    assert repr(fit) == "Fit: 3 steps in 1.3 s, ELBO -4, 2 skipped, interrupted"
