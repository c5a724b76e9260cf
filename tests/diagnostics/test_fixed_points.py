"""Fixed points against closed forms, for one drift and across draws."""

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.diagnostics.fixed_points import classify

F64 = torch.float64
LV = {"a": 1.1, "b": 0.4, "c": 0.9, "d": 0.2}


def starts(*edges, count=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(edges, dtype=F64).mT
    return low + (high - low) * torch.rand(count, len(edges), generator=generator, dtype=F64)


def lotka_volterra(a, b, c, d):
    def drift(t, z):
        x, y = z[..., 0], z[..., 1]
        return torch.stack([a * x - b * x * y, -c * y + d * x * y], -1)

    return drift


def hopf(mu, omega):
    def drift(t, z):
        x, y = z[..., 0], z[..., 1]
        r = mu - x**2 - y**2
        return torch.stack([r * x - omega * y, r * y + omega * x], -1)

    return drift


def well(t, z):
    return z - z**3


def test_lotka_volterra():
    a, b, c, d = LV.values()
    found = sd.fixed_points(lotka_volterra(**LV), starts((-1.0, 10.0), (-1.0, 6.0)))
    saddle, centre = found.points
    assert (saddle.kind, centre.kind) == ("saddle", "centre")
    assert np.abs(saddle.location).max() < 1e-10
    assert np.abs(centre.location - [c / d, a / b]).max() < 1e-10
    assert np.abs(saddle.eigenvalues - [a, -c]).max() < 1e-10
    turn = 1j * np.sqrt(a * c)
    assert np.abs(centre.eigenvalues - [turn, -turn]).max() < 1e-10
    assert found.converged.all()


def test_double_well():
    found = sd.fixed_points(well, starts((-2.0, 2.0)))
    assert [p.kind for p in found.points] == ["stable node", "unstable node", "stable node"]
    assert np.abs(np.concatenate([p.location[:, 0] for p in found.points]) - [-1, 0, 1]).max() < 1e-10
    assert np.abs(np.concatenate([p.eigenvalues[:, 0] for p in found.points]) - [-2, 1, -2]).max() < 1e-10


@pytest.mark.parametrize(("mu", "kind"), [(-0.3, "stable focus"), (0.3, "unstable focus"), (0.0, "centre")])
def test_hopf_normal_form(mu, kind):
    # At mu = 0 the zero is where |f| is of third order: Newton's method is slow, and its end less exact.
    found = sd.fixed_points(hopf(mu, 2.0), starts((-2.0, 2.0), (-2.0, 2.0)), tolerance=1e-10)
    (point,) = found.points
    assert point.kind == kind
    assert np.abs(point.location).max() < 1e-8
    assert np.abs(point.eigenvalues - [mu + 2j, mu - 2j]).max() < 1e-8


def test_linear_from_anywhere():
    A = torch.randn(5, 5, dtype=F64, generator=torch.manual_seed(0))
    m = torch.arange(5.0, dtype=F64)
    found = sd.fixed_points(lambda t, z: (z - m) @ A.mT, 10 * torch.randn(20, 5, dtype=F64))
    (point,) = found.points
    assert np.abs(point.location - m.numpy()).max() < 1e-9
    expected = np.linalg.eigvals(A.numpy())
    assert np.abs(np.sort_complex(point.eigenvalues[0]) - np.sort_complex(expected)).max() < 1e-9


def test_no_fixed_point():
    found = sd.fixed_points(lambda t, z: 1 + z**2, starts((-2.0, 2.0)))
    assert len(found) == 0
    assert not found.converged.any()
    assert "0 fixed points; of 80 starts x 1 draws 0% converged; 1 draws have none" in found.summary()


def test_zeros_far_from_the_starts_are_counted_only():
    """A drift that levels off to nothing is below any tolerance far away."""
    found = sd.fixed_points(lambda t, z: -z * torch.exp(-(z**2)), starts((-2.0, 2.0)))
    (point,) = found.points
    assert abs(point.location.item()) < 1e-12
    assert found.outside.sum() > 5
    assert not (found.converged & found.outside).any()
    assert "% outside the region" in found.summary()
    assert len(sd.fixed_points(lambda t, z: -z * torch.exp(-(z**2)), starts((-2.0, 2.0)), reach=100.0)) > 1


def check_zeros(found, drift):
    """What every result must pass: the drift is zero at all points, to the precision of their location."""
    for point in found.points:
        z = torch.as_tensor(point.location)
        assert drift(0.0, z).abs().max() < 1e-6
        assert point.distance.max() < 1e-6


def test_the_check_of_residuals_and_its_control():
    check_zeros(sd.fixed_points(well, starts((-2.0, 2.0))), well)
    loose = sd.fixed_points(well, starts((-2.0, 2.0)), tolerance=1e3, iterations=0)
    assert len(loose) > 3
    with pytest.raises(AssertionError):
        check_zeros(loose, well)
    assert "speed at most 1.0e-01" in loose.summary() or max(p.speed.max() for p in loose.points) > 0.1


class TestAcrossDraws:
    def test_location_and_eigenvalues_of_every_draw(self):
        draws = 60
        p = {k: v * torch.exp(0.1 * torch.randn(draws, dtype=F64, generator=torch.manual_seed(i)))
             for i, (k, v) in enumerate(LV.items())}  # fmt: skip
        found = sd.fixed_points(lotka_volterra(**p), starts((-1.0, 12.0), (-1.0, 7.0)))
        saddle, centre = found.points
        assert saddle.presence == centre.presence == 1.0
        expected = torch.stack([p["c"] / p["d"], p["a"] / p["b"]], -1).numpy()
        assert np.abs(centre.location - expected).max() < 1e-8
        assert np.abs(centre.eigenvalues[:, 0] - 1j * (p["a"] * p["c"]).sqrt().numpy()).max() < 1e-8
        low, high = np.quantile(expected[:, 0], [0.05, 0.95])
        assert f"({expected[:, 0].mean():.4g} [{low:.4g}, {high:.4g}]" in found.summary()

    def test_a_fold_takes_points_away(self):
        """dx = r + x^2 has two zeros where r < 0 and none above: a node and its partner are never one point."""
        r = torch.linspace(-0.5, 0.25, 31, dtype=F64)
        found = sd.fixed_points(lambda t, z: r[..., None] + z**2, starts((-1.5, 1.5)))
        have = r.numpy() < -1e-3
        assert len(found) >= 2
        stable, unstable = sorted(found.points[:2], key=lambda p: np.median(p.location))
        assert (stable.kind, unstable.kind) == ("stable node", "unstable node")
        for point, sign in ((stable, -1), (unstable, 1)):
            assert abs(point.presence - have.mean()) < 0.05
            there = r.numpy()[point.draw]
            strict = there < -1e-3
            assert np.abs(point.location[strict, 0] - sign * np.sqrt(-there[strict])).max() < 1e-6
        assert np.count_nonzero(~found.converged.any(0)) >= 9
        assert "draws have none" in found.summary()

    def test_an_uncertain_hopf_is_one_point(self):
        mu = torch.linspace(-0.3, 0.31, 40, dtype=F64)
        found = sd.fixed_points(hopf(mu, 2.0), starts((-2.0, 2.0), (-2.0, 2.0)))
        (point,) = found.points
        assert set(point.kinds) == {"stable focus", "unstable focus"}
        assert abs(point.kinds["stable focus"] - 0.5) < 0.05
        assert "stable focus 5" in found.summary() and "frequency 2" in found.summary()

    def test_a_wide_posterior_is_one_point_beside_a_draw_with_two(self):
        """One draw has three zeros on the right, the others one, spread around them."""
        where = torch.linspace(1.0, 2.0, 30, dtype=F64)
        two = torch.zeros(30, dtype=torch.bool)
        two[15] = True

        def drift(t, z):
            one = -(z - where[..., None])
            three = -(z - 1.2) * (z - 1.5) * (z - 1.8)
            return torch.where(two[..., None], three, one)

        found = sd.fixed_points(drift, starts((-2.0, 4.0)))
        assert [round(30 * p.presence) for p in found.points] == [30, 1, 1]
        assert np.ptp(found.points[0].location) == pytest.approx(1.0, abs=1e-6)

    def test_one_of_three_wells_is_missing_in_some_draws(self):
        """Tilted wells: the left one vanishes; the right one is not taken for it."""
        tilt = torch.linspace(0.0, 0.6, 25, dtype=F64)  # the fold is at 2 / sqrt(27) = 0.385
        found = sd.fixed_points(lambda t, z: z - z**3 + tilt[..., None], starts((-2.0, 2.0)))
        right = found.points[0]
        assert right.presence == 1.0
        assert (right.location > 0.9).all()
        left = next(p for p in found.points if p.location.max() < -0.5)
        assert abs(left.presence - 17 / 25) < 0.05


def test_classify():
    assert classify([-1, -2]) == "stable node"
    assert classify([1, 2 + 1j, 2 - 1j]) == "unstable focus"
    assert classify([1, -2 + 1j, -2 - 1j]) == "saddle"
    assert classify([0, -1]) == "degenerate"
    assert classify([1j, -1j, -1]) == "centre"
    assert classify([1j, -1j, 1]) == "unstable focus"


def test_context_time_and_single_precision():
    found = sd.fixed_points(
        lambda t, z, c: t + c - z, torch.linspace(-9, 9, 5)[:, None], t=2.0, context=torch.ones(1)
    )
    assert found.points[0].location.item() == pytest.approx(3.0, abs=1e-5)
    found = sd.fixed_points(lambda t, z: z - z**3, torch.linspace(-2, 2, 21)[:, None])
    assert [p.kind for p in found.points] == ["stable node", "unstable node", "stable node"]


def test_refuses():
    with pytest.raises(sd.ShapeError, match=r"`starts` must have shape \(start, state\) or .*, got \(2,\)"):
        sd.fixed_points(well, torch.zeros(2))
    theta = torch.ones(7, 1, 4, dtype=F64)
    with pytest.raises(sd.ShapeError, match=r"expected \(start, draw, state\)"):
        sd.fixed_points(lambda t, z: theta[..., None] * z, torch.zeros(5, 1, dtype=F64))
