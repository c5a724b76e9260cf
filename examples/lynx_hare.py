# %% [markdown]
# # Lynx and hare: a stochastic Lotka-Volterra model fitted to a century-old data set
#
# The Hudson Bay Company's records of pelts, 1900-1920. The question: what are the growth, predation and death rates,
# how much of the cycle is noise, and where would the populations have gone next?

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

# %% [markdown]
# The model: log populations follow dx = (alpha - beta e^y) dt + s dW, dy = (delta e^x - gamma) dt + s dW, and pelts are
# log-normal around the populations. Rates are per year; a Heun mean keeps five steps per year accurate.


# %%
def positive(name: str, median: float, spread: float = 0.5) -> torch.Tensor:
    return pyro.sample(name, dist.LogNormal(torch.tensor(median).log(), spread))


def model(batch: sd.Series) -> None:
    alpha, beta = positive("alpha", 0.7), positive("beta", 0.03)
    gamma, delta = positive("gamma", 0.7), positive("delta", 0.03)
    noise, error = positive("process_noise", 0.2), positive("pelt_error", 0.2)

    def drift(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        hare, lynx = z[..., 0].exp(), z[..., 1].exp()
        return torch.stack([alpha - beta * lynx, delta * hare - gamma], -1)

    grid = sd.TimeGrid(batch.times, substeps=5)
    start = dist.Normal(torch.tensor([10.0, 10.0]).log(), 1.0).to_event(1)
    with batch.plate("series"):
        path = sd.SDEPath(drift, noise[..., None], start, grid.ts, solver=sd.GaussianStep(mean=sd.Heun()))
        log_population = pyro.sample("log_population", path)
        seen = dist.LogNormal(grid.observed(log_population), error[..., None, None])
        pyro.sample("pelts", seen.mask(batch.mask).to_event(2), obs=batch.values)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    data = sd.datasets.lynx_hare()
    guide = sd.AmortizedGuide(model)
    fit = sd.fit(model, guide, data, steps=10 if smoke else 700, lr=0.02)
    print(fit)

    draws = 50 if smoke else 1000
    idata = sd.to_arviz(fit, data, draws=draws, coords={"state": ["hare", "lynx"]})
    names = ["alpha", "beta", "gamma", "delta", "process_noise", "pelt_error"]
    posterior = {name: idata["posterior"][name].values[0] for name in names}
    print(sd.summarise(posterior, interval=0.9))

    stats = idata["sample_stats"]
    print("Guide, with its paths:   ", sd.pareto_k((stats["lp"] - stats["log_q"]).values[0]))
    evidence = sd.evidence(fit, data, draws=draws // 2, particles=5 if smoke else 100)
    print("Guide, rates and noises: ", sd.pareto_k(evidence.importance.numpy()))
    print(f"log evidence {evidence.total:.2f}, ELBO {fit.elbo:.2f}")
    print(sd.diagnose(fit, data, draws=draws, particles=5 if smoke else 10))

    out.mkdir(parents=True, exist_ok=True)
    forecast = sd.predict(fit, data, ts=torch.arange(1921.0, 1931.0), draws=draws)
    axes = sd.plot_forecast(forecast, time_label="year")
    for axis, name in zip(axes, data.channels, strict=True):
        axis.set_ylabel(f"{name} pelts (thousands)")
    axes[0].figure.savefig(out / "lynx_hare.png", dpi=150)
    idata.to_netcdf(str(out / "lynx_hare.nc"))
    print(f"Wrote {out / 'lynx_hare.png'} and {out / 'lynx_hare.nc'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stochastic Lotka-Volterra on the Hudson Bay pelts.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
