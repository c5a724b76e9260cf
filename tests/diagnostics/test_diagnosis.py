import numpy as np
import pytest

from stochdyn.diagnostics.coverage import Coverage
from stochdyn.diagnostics.diagnosis import Diagnosis, LatentUse, Verdict
from stochdyn.diagnostics.weights import Estimate


def use(name="z", sd=0.5, prior=1.0, **changes):
    ones = np.ones((3, 2))
    given = {"local": True, "units": 2, "active": 2, "kl": 1.5}
    return LatentUse(name, posterior_sd=sd * ones, prior_sd=prior * ones, **{**given, **changes})


def diagnosis(*levels, **more):
    verdicts = tuple(Verdict(f"check {i}", level, "found") for i, level in enumerate(levels))
    return Diagnosis(verdicts, ("Ada", "Bo"), 100, Estimate(-3.0, 0.1), **more)


def test_ok_unless_something_is_bad():
    assert diagnosis("good", "fair", "-").ok
    found = diagnosis("good", "bad")
    assert not found.ok
    assert str(found).splitlines()[0] == "The posterior cannot be believed: check 1."
    assert found.verdict("check 1").level == "bad"


def test_the_worst_series_and_the_numbers_by_name():
    gap = Estimate(np.array([0.1, 2.0]), np.array([0.1, 0.1]))
    cover = Coverage.of(("y",), [np.linspace(0, 1, 11)], how="hidden")
    found = diagnosis("good", gap=Estimate(2.1, 0.2), gap_per_series=gap, latents=(use(),), coverage=cover)
    assert found.worst_series == "Bo"
    data = found.to_xarray()
    assert data["gap_per_series"].sel(series="Bo").item() == 2.0
    assert data["sd_ratio"].sel(latent="z").item() == 0.5
    assert data["coverage"].sel(channel="y", level=0.5).item() == pytest.approx(5 / 11)
    assert diagnosis("good").worst_series is None


def test_latents():
    assert use().ratio == 0.5 and not use().collapsed and not use().is_point
    assert use(sd=1.0, active=0, kl=0.001).collapsed
    assert not use(sd=1.0, active=0, kl=0.5).collapsed  # the prior is narrow, the posterior is not the prior
    assert not use(sd=1.0, active=None, kl=0.001).collapsed
    assert use(sd=1e-9).is_point
    assert np.isnan(use(prior=np.nan).ratio)
    lines = str(
        diagnosis("good", latents=(use("a_long_name"), use("b", local=False, active=None)))
    ).splitlines()
    assert lines[-3].startswith("latent") and "per series" in lines[-2] and "in all" in lines[-1]
