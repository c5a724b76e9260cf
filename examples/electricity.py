# %% [markdown]
# # When did the price of electricity jump, and is heat to blame?
#
# Daily spot prices are pulled back to a level, wander, and jump: on some days they rise tenfold, and fall back. A
# mean-reverting jump diffusion says so. Its path is observed as it is, so its parameters have an exact likelihood in
# which the jumps are summed out, and afterwards every day has a probability of a jump. The intensity of the jumps may
# depend on the day's highest temperature, by a factor per ten degrees that is learned.
#
# With `STOCHDYN_DATA` set to the folder of `electricity_victoria_daily.csv` the data are those of Victoria, Australia,
# 2015 to 2020; without it they are simulated from the model, with known answers. Run: `python examples/electricity.py`.

# %%
import argparse
import csv
import os
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd

F64 = torch.float64
UNIT = (
    30.0  # prices per megawatt hour are read as asinh(price / 30): linear near zero, logarithmic far from it
)
TRUTH = {"level": 1.0, "pull": 0.15, "noise": 0.2, "often": 0.05, "heat": 2.0, "shift": 0.3, "spread": 0.8}


# %% [markdown]
# ## The data


# %%
def real(folder: str) -> sd.Series:
    with (Path(folder) / "electricity_victoria_daily.csv").open() as file:
        rows = list(csv.DictReader(file))
    price = torch.tensor([float(row["RRP"]) for row in rows], dtype=F64)
    hottest = torch.tensor([float(row["max_temperature"]) for row in rows], dtype=F64)
    return series_of(torch.asinh(price / UNIT), hottest)


def simulated(days: int) -> sd.Series:
    season = torch.arange(days, dtype=F64) * 2 * torch.pi / 365.25
    hottest = 20 + 7 * season.cos() + 4 * torch.randn(days, dtype=F64)
    numbers = {name: torch.tensor(value, dtype=F64) for name, value in TRUTH.items()}
    empty = series_of(torch.ones(days, dtype=F64), hottest)
    return series_of(path_of(empty, numbers).sample()[0, :, 0], hottest)


def series_of(price: Tensor, hottest: Tensor) -> sd.Series:
    tens = ((hottest - 25) / 10)[None, :, None]
    days = torch.arange(len(price), dtype=F64)
    return sd.Series(days, price[None, :, None], channels=["asinh(price / 30)"], covariates=tens)


# %% [markdown]
# ## The model
# Level, speed of the pull and noise of the diffusion; how often jumps come at 25 degrees, and how much more often ten
# degrees above; mean and spread of their sizes.


# %%
def path_of(batch: sd.Series, numbers: dict[str, Tensor]) -> sd.JumpDiffusionPath:
    n = {name: value[..., None] for name, value in numbers.items()}
    jumps = sd.CompoundPoisson(
        lambda t, z, tens: n["often"] * n["heat"] ** tens, sd.NormalJump(n["shift"], n["spread"])
    )
    return sd.JumpDiffusionPath(
        lambda t, z, tens: n["pull"] * (n["level"] - z),
        lambda t, z, tens: n["noise"] + 0 * z,
        jumps,
        batch.values[:, 0],
        batch.times,
        context=batch.covariates,
    )


def model(batch: sd.Series) -> None:
    numbers = {
        "level": pyro.sample("level", dist.Normal(torch.tensor(1.0, dtype=F64), 1.0)),
        "pull": pyro.sample("pull", dist.LogNormal(torch.tensor(-2.0, dtype=F64), 1.0)),
        "noise": pyro.sample("noise", dist.LogNormal(torch.tensor(-1.5, dtype=F64), 1.0)),
        "often": pyro.sample("often", dist.LogNormal(torch.tensor(-3.0, dtype=F64), 1.0)),
        "heat": pyro.sample("heat", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0)),
        "shift": pyro.sample("shift", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0)),
        "spread": pyro.sample("spread", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0)),
    }
    with batch.plate("series"):
        pyro.sample("price", path_of(batch, numbers), obs=batch.values)


# %% [markdown]
# ## Fit, and read


# %%
def main(smoke: bool = False) -> None:
    pyro.set_rng_seed(0)
    folder = os.environ.get("STOCHDYN_DATA")
    series = real(folder) if folder else simulated(200 if smoke else 2000)
    print(f"{'prices of Victoria' if folder else 'simulated prices'}, {series.times.shape[-1]} days")
    guide = sd.AmortizedGuide(model)
    steps = 30 if smoke else 300
    fit = sd.fit(
        model, guide, series, steps=steps, lr=0.03, objective=sd.ELBO(particles=8), progress=not smoke
    )
    print(fit)
    draws = sd.predict(fit, series, draws=20 if smoke else 500).latents
    for name, known in TRUTH.items():
        q = draws[name].flatten().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=F64))
        truth = "" if folder else f"   (truth {known:g})"
        print(f"{name:<8}{q[1]:8.3f}  [{q[0]:.3f}, {q[2]:.3f}]{truth}")
    reading = sd.read_jumps(fit, series, draws=10 if smoke else 50)
    likely = (reading.probability[0] > 0.5).nonzero()[0]
    print(
        f"{len(likely)} days jumped with a probability above one half; expected {reading.probability.sum():.0f}"
    )
    tens = series.covariates[0, :-1, 0]
    hot = tens > 0.5
    share = torch.from_numpy(reading.probability[0] > 0.5).double()
    print(f"of days above 30 degrees {share[hot].mean():.1%}, of the others {share[~hot].mean():.1%}")
    plot(reading)


def plot(reading: sd.JumpReading) -> None:
    mpl.use("Agg")
    axes = sd.plot_jumps(reading, time_label="day")
    Path("examples/output").mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig("examples/output/electricity.png", dpi=150)
    print("plot: examples/output/electricity.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Jumps of the price of electricity.")
    parser.add_argument("--smoke", action="store_true", help="a short run, in seconds")
    main(parser.parse_args().smoke)
