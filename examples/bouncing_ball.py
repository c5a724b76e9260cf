# %% [markdown]
# # A bouncing ball: what are gravity and restitution, if only some heights were seen?
#
# Between bounces a ball falls freely; at the floor its velocity turns and shrinks. Where it bounces depends on the
# parameters, so their gradient must pass through the times of the bounces. `sd.Trigger` finds them, for every ball of a
# batch its own. A ball that comes to rest bounces infinitely often before: that has a name, too.

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

SOLVER = sd.RungeKutta4()  # exact for a parabola: one step per gap, and one to each bounce
NOISE = 0.05


# %%
def drop(
    height: torch.Tensor, gravity: torch.Tensor, restitution: torch.Tensor, ts: torch.Tensor
) -> tuple[torch.Tensor, sd.TriggeredJumps]:
    """Path and bounces of balls of batch shape."""

    def fall(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.stack(torch.broadcast_tensors(z[..., 1], -gravity), -1)

    def bounce(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.stack(torch.broadcast_tensors(z[..., 0], -restitution * z[..., 1]), -1)

    floor = sd.Trigger(lambda t, z: z[..., 0], bounce, direction=-1)
    start = torch.stack([height, torch.zeros_like(height)], -1)
    return sd.odeint(fall, start, ts, solver=SOLVER, jumps=[floor], return_jumps=True)


# %% [markdown]
# The model: one gravity, a restitution for each ball. Thirty heights of each are seen with an error of 5 cm.


# %%
def model(batch: sd.Series) -> None:
    gravity = pyro.sample("gravity", dist.LogNormal(torch.tensor(2.0, dtype=torch.float64), 0.5))
    with batch.plate("balls"):
        restitution = pyro.sample("restitution", dist.Beta(torch.tensor(4.0, dtype=torch.float64), 2.0))
        height = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)[batch.index]
        path, _ = drop(height, gravity, restitution, batch.times)
        seen = dist.Normal(path[..., :1], NOISE).mask(batch.mask).to_event(2)
        pyro.sample("height", seen, obs=batch.values)


def simulate() -> tuple[sd.Series, torch.Tensor]:
    restitution = torch.tensor([0.75, 0.85, 0.65], dtype=torch.float64)
    ts = torch.linspace(0.05, 3.0, 30, dtype=torch.float64)
    grid = torch.cat([torch.zeros(1, dtype=torch.float64), ts])
    heights = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    path, _ = drop(heights, torch.tensor(9.81, dtype=torch.float64), restitution, grid)
    values = path[..., :1] + NOISE * torch.randn(3, 31, 1, dtype=torch.float64)
    return sd.Series(grid, values, ids=["rubber", "tennis", "basket"]), restitution


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    pyro.set_rng_seed(0)
    data, truth = simulate()
    guide = sd.AmortizedGuide(model)
    fit = sd.fit(model, guide, data, steps=4 if smoke else 200, lr=0.05)
    print(fit)
    draws = 10 if smoke else 200
    latents = sd.predict(fit, data, draws=draws).latents
    gravity, restitution = latents["gravity"].reshape(draws), latents["restitution"].reshape(draws, 3)
    print(f"gravity {gravity.mean():.3f} +- {gravity.std():.3f}, truth 9.81")
    for k, name in enumerate(data.ids):
        own = restitution[:, k]
        print(f"{name:<7} restitution {own.mean():.3f} +- {own.std():.3f}, truth {truth[k]:.2f}")

    with torch.no_grad():
        ts = torch.linspace(0, 12, 121 if smoke else 1201, dtype=torch.float64)
        heights = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
        path, bounces = drop(heights, gravity.mean(), restitution.mean(0), ts)
    for name, count, rest in zip(
        data.ids, bounces.counts.tolist(), bounces.accumulated.tolist(), strict=True
    ):
        print(f"{name:<7} {count} bounces until they accumulate, at {rest:.2f} s: at rest")
    plot(data, ts, path[..., 0], bounces, out)


def plot(
    data: sd.Series, ts: torch.Tensor, heights: torch.Tensor, bounces: sd.TriggeredJumps, out: Path
) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    for k, axis in enumerate(axes):
        rest = bounces.accumulated[k].item()
        axis.plot(ts, heights[k], lw=1.2)
        axis.plot(data.times, data.values[k, :, 0], "k.", ms=5)
        axis.plot(bounces.times[k], torch.zeros_like(bounces.times[k]), "|", c="C3", ms=9)
        axis.axvline(rest, c="0.6", ls="--", lw=1)
        axis.text(rest, axis.get_ylim()[1] * 0.8, " at rest", color="0.4")
        axis.set(ylabel="height, m", title=f"{data.ids[k]}: seen until 3 s", ylim=(-0.2, None))
    axes[-1].set_xlabel("time, s")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "bouncing_ball.png", dpi=150)
    plt.close(figure)
    print(f"Wrote {out / 'bouncing_ball.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Gravity and restitution from heights of bouncing balls.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
