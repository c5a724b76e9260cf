# %% [markdown]
# # Two gauges, read now and then: what comes next, and how sure may I be?
#
# In a harbour basin the water sloshes. Level and current belong together, but often only one of the two is read, at
# irregular times, with an error. From what was read so far we want both at any time, with honest intervals, and the
# probability that the level passes a mark within the next hours. Nobody tells the model how water moves:
# `ObservationJumpODE` learns a state that flows between readings and jumps at them. The data are simulated by a linear
# stochastic equation, for which the Kalman-Bucy filter knows the best possible answer. It is an `ObservationJumpODE`
# too, with flow and jump written by hand: the yardstick.

# %%
import argparse
import time
from pathlib import Path

import matplotlib as mpl
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import stochdyn as sd

A = torch.tensor([[-0.15, -1.2], [1.2, -0.15]])
NOISE, ERROR, MARK = 0.35, 0.1, 0.9
NAMES = ["level", "current"]
AHEAD = torch.linspace(0, 4, 17)[1:]


# %% [markdown]
# The truth, stationary, by exact steps: the matrix is a rotation that decays, so every step has the same noise in all
# directions.


# %%
def stationary() -> float:
    """The variance of both coordinates."""
    return NOISE**2 / (2 * -float(A[0, 0]))


def simulate(basins: int, readings: int) -> tuple[sd.Series, Tensor]:
    """Readings of one gauge or both, and what is read of both at `AHEAD`. Time 0 is that of the last reading."""
    times = (0.1 + 2 * torch.rand(basins, readings, dtype=torch.float64) ** 3).cumsum(-1)
    times = times - times[:, -1:]
    every = torch.cat([times, AHEAD.expand(basins, -1)], -1)
    z = [stationary() ** 0.5 * torch.randn(basins, 2)]
    for dt in every.diff(dim=-1).float().unbind(-1):
        spread = (stationary() * (1 - (2 * A[0, 0] * dt).exp())).sqrt()[:, None]
        moved = torch.linalg.matrix_exp(A * dt[:, None, None]) @ z[-1][..., None]
        z.append(moved[..., 0] + spread * torch.randn(basins, 2))
    values = torch.stack(z, 1) + ERROR * torch.randn(basins, len(z), 2)
    which = torch.randint(3, (basins, readings))
    mask = torch.stack([which != 0, which != 1], -1)
    return sd.Series(times, values[:, :readings], mask, channels=NAMES), values[:, readings:]


# %% [markdown]
# The yardstick. Its state is the mean and the covariance of what is hidden. Between readings they follow their moment
# equations; a reading is Kalman's update. Nothing is learned.


# %%
class MomentEquations(nn.Module):
    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        P = h[..., 2:].unflatten(-1, (2, 2))
        return torch.cat([h[..., :2] @ A.mT, (A @ P + P @ A.mT + NOISE**2 * torch.eye(2)).flatten(-2)], -1)


class KalmanUpdate(nn.Module):
    def forward(self, t: Tensor, h: Tensor, y: Tensor, mask: Tensor, seen: dist.Normal) -> Tensor:
        m, P = h[..., :2], h[..., 2:].unflatten(-1, (2, 2))
        for c in range(2):
            gain = P[..., c] / (P[..., c, c] + ERROR**2)[..., None] * mask[..., c, None]
            m = m + gain * (y[..., c] - m[..., c])[..., None]
            P = P - gain[..., None] * P[..., c, None, :]
        return torch.cat([m, P.flatten(-2)], -1)


class Reading(nn.Module):
    def forward(self, h: Tensor) -> dist.Normal:
        return dist.Normal(h[..., :2], (h[..., [2, 5]] + ERROR**2).sqrt())


def kalman() -> sd.ObservationJumpODE:
    start = torch.tensor([0.0, 0.0, stationary(), 0.0, 0.0, stationary()])
    parts = {"flow": MomentEquations(), "jump": KalmanUpdate(), "decoder": Reading()}
    return sd.ObservationJumpODE(2, 6, start=start, solver=sd.RungeKutta4(4), **parts)


# %% [markdown]
# The learned model has all defaults but the solver, which takes larger steps.


# %%
def learned(data: sd.Series, steps: int) -> sd.ObservationJumpODE:
    model = sd.ObservationJumpODE(2, 32, solver=sd.RungeKutta4(1))
    sd.fit(model, model.guide, data, steps=steps, batch_size=min(100, len(data)), lr=1e-2, progress=False)
    return model.eval()


def score(model: sd.ObservationJumpODE, data: sd.Series) -> float:
    """The log likelihood of a reading, given those before."""
    seen = model.one_step_ahead(data)
    return float(seen.log_prob(data.values)[data.mask].mean())


def intervals(model: sd.ObservationJumpODE, data: sd.Series, later: Tensor) -> str:
    """How often 90 % intervals hold what was read later, and their width."""
    seen = model.predictive(data, AHEAD)
    half = 1.645 * seen.variance.sqrt()
    inside = ((later - seen.mean).abs() <= half).float()
    return f"{inside.mean():.1%}, width {2 * half.mean():.2f}"


def chances(draws: Tensor, later: Tensor) -> str:
    """The predicted probabilities (draw, basin, time, channel) that the level passes the mark, against what came."""
    passed = (later[..., 0] > MARK).any(-1).float()
    chance = (draws[..., 0] > MARK).any(-1).float().mean(0)
    return f"in {chance.mean():.0%} (Brier score {(chance - passed).square().mean():.3f})"


def show(model: sd.ObservationJumpODE, data: sd.Series, later: Tensor, draws: Tensor, out: Path) -> None:
    """One basin: what is known at every time, and five of the draws that follow the last reading."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    ts = torch.linspace(max(float(data.times[0, 0]), -9.0), float(AHEAD[-1]), 600, dtype=torch.float64)
    known = model.predictive(data[[0]], ts)
    mean, half = known.mean[0], 1.645 * known.variance.sqrt()[0]
    for c, axis in enumerate(axes):
        axis.fill_between(
            ts, mean[:, c] - half[:, c], mean[:, c] + half[:, c], color="#1f6f8b", alpha=0.25, lw=0
        )
        axis.plot(ts, mean[:, c], color="#1f6f8b", lw=1.2, label="what is known, 90 %")
        axis.plot(AHEAD, draws[:5, 0, :, c].T, color="#7a828c", lw=0.7)
        at = data.mask[0, :, c] & (data.times[0] >= ts[0])
        axis.plot(data.times[0, at], data.values[0, at, c], "o", ms=4, color="#22262b", label="read")
        axis.plot(AHEAD, later[0, :, c], "x", ms=5, color="#c8553d", label="read later")
        axis.axvline(0, color="#7a828c", lw=0.8, ls=":")
        axis.set_ylabel(NAMES[c])
    axes[0].axhline(MARK, color="#c8553d", lw=0.8)
    axes[0].legend(loc="lower left", ncols=3, frameon=False)
    axes[1].set_xlabel("hours from the last reading")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "observation_jumps.png", dpi=150)
    print(f"Wrote {out / 'observation_jumps.png'}")


def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    basins, readings, steps, draws = (20, 8, 3, 20) if smoke else (600, 30, 500, 200)
    data, _ = simulate(basins, readings)
    others, later = simulate(10 if smoke else 300, readings)
    started = time.perf_counter()
    models = {"learned": learned(data, steps), "Kalman": kalman()}
    print(f"The fit took {time.perf_counter() - started:.0f} s")
    passed = (later[..., 0] > MARK).any(-1).float().mean()
    print(
        f"The level passes {MARK:g} within 4 hours in {passed:.0%} of {len(others)} basins never seen before."
    )
    for name, model in models.items():
        joint = sd.predict((model, model.guide), others, ts=AHEAD, draws=draws).observations[:, :, readings:]
        with torch.no_grad():
            single = model.predictive(others, AHEAD).sample((draws,))
            print(f"{name:8s} log likelihood of a reading {score(model, others):.3f}")
            print(f"{name:8s} 90 % intervals of the next 4 hours hold {intervals(model, others, later)}")
        print(f"{name:8s} passes, drawn jointly: {chances(joint, later)}")
        print(f"{name:8s} passes, time by time: {chances(single, later)}")
        if name == "learned":
            with torch.no_grad():
                show(model, others, later, joint, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two gauges, read now and then: a state that jumps.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
