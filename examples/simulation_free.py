# %% [markdown]
# # Training without a solver: what does it cost, and is the posterior as good?
#
# Forty series of a particle in a double well, seen now and then. The grid is fine, so a guide that is simulated needs
# many steps for every gradient. The same guide is trained twice: by its marginals (`PathELBO`), where the grid does not
# matter, and by simulation (`ELBO`). Both then guide paths on the same grid, and are compared there.

# %%
import argparse
import time

import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

# %% [markdown]
# The model knows nothing of how it is trained. It reads its path by `grid.observed(z)` alone.


# %%
def well(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return 4 * z - 4 * z**3


def path(ts: torch.Tensor) -> sd.SDEPath:
    return sd.SDEPath(well, torch.tensor([0.7]), dist.Normal(torch.zeros(1), 0.7).to_event(1), ts)


def make_model(substeps: int):
    def model(batch: sd.Series) -> None:
        grid = sd.TimeGrid(batch.times, substeps=substeps)
        with batch.plate("series"):
            z = pyro.sample("z", path(grid.ts))
            pyro.sample(
                "y", dist.Normal(grid.observed(z), 0.3).mask(batch.mask).to_event(2), obs=batch.values
            )

    return model


def simulate(number: int, points: int) -> sd.Series:
    times = 0.25 * torch.arange(points, dtype=torch.float64)
    grid = sd.TimeGrid(times, substeps=50)
    z = grid.observed(path(grid.ts).sample((number,)))
    return sd.Series(times, z + 0.3 * torch.randn_like(z))


# %% [markdown]
# One argument decides: the objective. Steps and learning rate are the same for both.


# %%
def train(
    objective: sd.AbstractObjective, data: sd.Series, substeps: int, steps: int
) -> tuple[sd.Fit, float]:
    torch.manual_seed(0)
    model = make_model(substeps)
    guide = sd.AmortizedGuide(model, sd.GRUEncoder(obs_dim=1, hidden=32), paths=sd.Marginals())
    objective.loss(model, guide, data)  # sets the guide up, outside the clock
    started = time.perf_counter()
    fit = sd.fit(model, guide, data, objective=objective, steps=steps, lr=1e-2, progress=False)
    return fit, (time.perf_counter() - started) / steps


def on_the_grid(fit: sd.Fit, data: sd.Series, draws: int) -> tuple[float, float]:
    """The simulated ELBO per series, whatever the objective of the training: here fits are comparable."""
    fit.guide.eval()
    with torch.no_grad():
        values = -torch.stack([sd.ELBO().loss(fit.model, fit.guide, data) for _ in range(draws)]) / len(data)
    return values.mean().item(), (values.std() / draws**0.5).item()


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    data = simulate(10 if smoke else 40, 12)
    steps, draws = (10, 5) if smoke else (300, 50)

    print(f"both trained by {steps} steps")
    print("substeps  objective  seconds per step  ELBO on the grid, per series")
    for substeps in (5, 25):
        for objective in (sd.ELBO(), sd.PathELBO(times=2)):
            fit, seconds = train(objective, data, substeps, steps)
            mean, error = on_the_grid(fit, data, draws)
            name = type(objective).__name__
            print(f"{substeps:8d}  {name:9s}  {seconds:16.4f}  {mean:8.2f} +- {error:.2f}")
    # The bound of the continuous-time model is another quantity: not to be ranked against those above.
    evidence = sd.evidence(fit, data, particles=50 if smoke else 500)
    print(f"log evidence on the finest grid, per series: {float(evidence.total) / len(data):.2f}")
    smoothed = sd.predict(fit, data, draws=50)
    right = (smoothed.states.mean(0) > 0).eq(data.values > 0).double().mean()
    print(f"well of the smoothed mean agrees with the sign of the observation: {100 * float(right):.0f} %")


if __name__ == "__main__":
    main()
