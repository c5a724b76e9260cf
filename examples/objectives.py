# %% [markdown]
# # Which objective? Three estimators of the ELBO and the importance-weighted bound on one model
#
# Twenty series, each an Ornstein-Uhlenbeck process with a rate of its own around a common level. The question: how
# close do the bounds come to each other, and how noisy are the gradients that train the guide?

# %%
import argparse
import time

import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

# %% [markdown]
# The model: one global latent (`level`), two local ones per series (`rate`, then the path given it).


# %%
def model(batch: sd.Series) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("series"):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.7))

        def drift(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return rate[..., None] * (level[..., None] - z)

        start = dist.Normal(torch.zeros(1), 2.0).to_event(1)
        z = pyro.sample("z", sd.SDEPath(drift, torch.tensor([0.5]), start, grid.ts))
        pyro.sample("y", dist.Normal(grid.observed(z), 0.2).mask(batch.mask).to_event(2), obs=batch.values)


def simulate(number: int = 20, points: int = 12) -> sd.Series:
    times = torch.linspace(0, 3, points, dtype=torch.float64)
    grid = sd.TimeGrid(times, substeps=2)
    rate = torch.exp(0.7 * torch.randn(number))
    start = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    path = sd.SDEPath(lambda t, z: rate[..., None] * (1.0 - z), torch.tensor([0.5]), start, grid.ts)
    z = grid.observed(path.sample())
    return sd.Series(times, z + 0.2 * torch.randn_like(z))


# %% [markdown]
# Each objective trains a guide of its own. Then its bound is averaged, and its gradient noise is the root of the summed
# variances over the guide's parameters, all at the guide that the first objective trained.


# %%
OBJECTIVES = {
    "ELBO, sticking the landing": sd.ELBO(),
    "ELBO, analytic KL": sd.ELBO(estimator=sd.AnalyticKL()),
    "ELBO, log ratio": sd.ELBO(estimator=sd.LogRatio()),
    "IWAE(10), doubly reparametrised": sd.IWAE(10),
    "IWAE(10), plain": sd.IWAE(10, doubly_reparametrised=False),
}


def bound(objective: sd.AbstractObjective, guide: sd.AmortizedGuide, data: sd.Series, repeats: int) -> tuple:
    with torch.no_grad():
        draws = torch.stack([-objective.loss(model, guide, data) for _ in range(repeats)]) / len(data)
    return draws.mean().item(), (draws.std() / repeats**0.5).item()


def noise(objective: sd.AbstractObjective, guide: sd.AmortizedGuide, data: sd.Series, repeats: int) -> float:
    rows = []
    for _ in range(repeats):
        gradients = torch.autograd.grad(objective.loss(model, guide, data), list(guide.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).var(0).sum().sqrt().item()


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    data = simulate(number=5, points=5) if smoke else simulate()
    steps, repeats = (3, 3) if smoke else (300, 60)
    reference: sd.AmortizedGuide | None = None
    print(f"{'objective':<33}{'bound per series':>20}{'gradient noise':>16}{'ms per step':>13}")
    for name, objective in OBJECTIVES.items():
        guide = sd.AmortizedGuide(model)
        begun = time.perf_counter()
        sd.fit(model, guide, data, steps=steps, lr=0.02, objective=objective, progress=False)
        each = 1000 * (time.perf_counter() - begun) / steps
        guide.eval()
        reference = reference or guide
        mean, error = bound(objective, guide, data, repeats)
        spread = noise(objective, reference, data, repeats)
        print(f"{name:<33}{mean:>12.3f} +- {error:.3f}{spread:>16.2f}{each:>13.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Objectives side by side on one model.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
