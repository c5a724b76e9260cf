# %% [markdown]
# # Known physics: what does my mechanistic model miss?
#
# A fish stock grows by the logistic law, whose rate and capacity are known from elsewhere. But there is a fishery, and
# nobody wrote down how its catch depends on the stock. A network with random weights stands in for the missing rate:
# the fit gives its posterior, and the plot its intervals against the catch that the data were simulated with.

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

GROWTH, CAPACITY, NOISE, ERROR = 1.0, 5.0, 0.1, 0.05
AT = torch.linspace(0.15, 5.0, 60).log()[:, None]


# %% [markdown]
# The truth: a catch that rises with the stock and saturates. The model knows the first function only. The state is the
# log of the stock, so rates are per fish and year.


# %%
def growth(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return GROWTH * (1 - z.exp() / CAPACITY)


def catch(z: torch.Tensor) -> torch.Tensor:
    return 1.5 * z.exp() / (1 + z.exp().square())


def simulate(stocks: int) -> sd.Series:
    times = torch.linspace(0, 5, 21, dtype=torch.float64)
    grid = sd.TimeGrid(times, substeps=20)
    start = torch.linspace(-2.0, 1.6, stocks)[:, None]
    path = sd.SDEPath(lambda t, z: growth(t, z) - catch(z), torch.tensor([NOISE]), start, grid.ts)
    stock = grid.observed(path.sample())
    return sd.Series(times, stock + ERROR * torch.randn_like(stock), channels=["log stock"])


# %% [markdown]
# The model: the drift is the known growth plus a network, `sd.Residual`. Its weights have width-scaled priors. They are
# drawn once, outside the plate of the stocks, and what they say of the missing rate is recorded.


# %%
class Fishery(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        network = sd.NeuralField(1, hidden=(16,), activation=torch.tanh)
        self.drift = sd.Residual(
            growth, sd.bayesian(network, "missing_rate", prior=sd.WidthScaled(weight=2.0))
        )

    def forward(self, batch: sd.Series) -> None:
        grid = sd.TimeGrid(batch.times, substeps=2)
        drift = sd.draw_weights(self.drift)
        pyro.deterministic("missing", drift.learned(torch.zeros(1), AT))
        with batch.plate("stocks"):
            start = dist.Normal(torch.tensor([0.5]), 1.0).to_event(1)
            path = sd.SDEPath(
                drift, torch.tensor([NOISE]), start, grid.ts, solver=sd.GaussianStep(mean=sd.Heun())
            )
            z = pyro.sample("z", path)
            seen = dist.Normal(grid.observed(z), ERROR).mask(batch.mask).to_event(2)
            pyro.sample("y", seen, obs=batch.values)


def prior_draws(model: Fishery, draws: int) -> torch.Tensor:
    with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
        return sd.draw_weights(model.drift, plates=["draws"]).learned(torch.zeros(1), AT)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    pyro.set_rng_seed(0)
    data, model = simulate(6 if smoke else 24), Fishery()
    guide = sd.AmortizedGuide(model, latents=sd.MeanField())
    fit = sd.fit(model, guide, data, steps=20 if smoke else 500, lr=0.03)
    print(fit)

    draws = 40 if smoke else 500
    missing = sd.predict(fit, data, draws=draws).latents["missing"].reshape(draws, -1)
    truth = -catch(AT)[:, 0]
    low, high = missing.quantile(torch.tensor([0.025, 0.975]), dim=0)
    seen = (AT[:, 0] >= data.values.quantile(0.02)) & (AT[:, 0] <= data.values.quantile(0.98))
    inside = ((low <= truth) & (truth <= high))[seen].float().mean()
    error = (missing.mean(0) - truth)[seen].square().mean().sqrt()
    print(
        f"Where the stock was seen: error {error:.3f}, with no network {truth[seen].square().mean().sqrt():.3f}"
    )
    print(f"The 95 % interval holds the truth at {inside:.0%} of the points")

    out.mkdir(parents=True, exist_ok=True)
    labels = ("stock", "missing rate, per fish and year")
    ax = sd.plot_function(AT.exp(), missing, prior=prior_draws(model, draws), truth=truth, labels=labels)
    stock = data.values.flatten().exp()
    ax.plot(
        stock, torch.full_like(stock, 0.02), "|", ms=6, c="k", alpha=0.2, transform=ax.get_xaxis_transform()
    )
    ax.figure.savefig(out / "known_physics.png", dpi=150)
    print(f"Wrote {out / 'known_physics.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a logistic model of a fish stock misses.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
