# %% [markdown]
# # Below the limit of quantification
#
# A drug is cleared from the blood; an assay reports nothing below its limit, and late samples are lost to it. The
# question: what becomes of the clearance rate when these readings are dropped, replaced by half the limit, or counted
# as what they are, "at or below the limit"?

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd

RATE, WIGGLE, ERROR, START = 0.5, 0.15, 0.2, 1.5  # per hour; log concentration at time 0
LIMIT = 0.3  # mg/l

# %% [markdown]
# The model: log concentrations fall, dx = -rate dt + wiggle dW, and readings are normal around x on the log scale (the
# limit is then log LIMIT). Subjects differ in where they start.


# %%
def model(batch: sd.Series) -> None:
    rate = pyro.sample("rate", dist.LogNormal(-1.0, 1.0))
    wiggle = pyro.sample("wiggle", dist.LogNormal(-2.0, 0.7))
    error = pyro.sample("error", dist.LogNormal(-1.5, 0.7))
    grid = sd.TimeGrid(batch.times, substeps=2)
    start = dist.Normal(torch.tensor([START]), 0.5).to_event(1)
    with batch.plate("subject"):
        drift = lambda t, z: 0 * z - rate[..., None]  # noqa: E731
        z = pyro.sample("z", sd.SDEPath(drift, wiggle[..., None], start, grid.ts))
        batch.observe("y", dist.Normal(grid.observed(z), error[..., None, None]))


# %% [markdown]
# Twelve subjects, sampled for eight hours. What the assay does not see is simulated too, so that it can be compared.


# %%
def simulate(subjects: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    times = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    start = START + 0.5 * torch.randn(subjects, 1, generator=generator)
    steps = torch.cat([times[:1], times.diff()])
    walk = (WIGGLE * steps.sqrt() * torch.randn(subjects, len(times), generator=generator)).cumsum(1)
    readings = start - RATE * times + walk + ERROR * torch.randn(subjects, len(times), generator=generator)
    return times, readings[..., None]


def treatments(times: Tensor, y: Tensor) -> dict[str, sd.Series]:
    limit = torch.tensor(LIMIT).log()
    low = y <= limit
    return {
        "dropped": sd.Series(times, y, mask=~low),
        "half the limit": sd.Series(times, torch.where(low, limit - torch.tensor(2.0).log(), y)),
        "censored": sd.Series(times, y, lower=limit),
        "nothing lost": sd.Series(times, y),
    }


# %%
def plot(path: Path, times: Tensor, y: Tensor, rates: dict[str, Tensor], forecast: sd.Prediction) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    subject = int((y <= torch.tensor(LIMIT).log()).sum((1, 2)).argmax())
    draws = forecast.observations[:, subject, :, 0].exp()
    low, mid, high = (draws.quantile(q, 0) for q in (0.05, 0.5, 0.95))
    left.fill_between(
        times, low, high, color="#3b6ea5", alpha=0.25, lw=0, label="90 % of the posterior predictive"
    )
    left.plot(times, mid, color="#3b6ea5", label="median")
    seen = y[subject, :, 0].exp()
    lost = seen <= LIMIT
    left.plot(times[~lost], seen[~lost], "o", color="black", ms=5, label="reported")
    left.plot(times[lost], seen[lost], "o", mfc="white", color="black", ms=5, label="lost to the limit")
    left.axhline(LIMIT, color="#b5482f", ls="--", lw=1, label="limit of quantification")
    left.set(
        xlabel="hours after the dose",
        ylabel="concentration (mg/l)",
        yscale="log",
        title="One subject, censored",
    )
    left.legend(fontsize="small", loc="lower left")
    for row, (name, draws) in enumerate(rates.items()):
        low, mid, high = (float(draws.quantile(q)) for q in (0.05, 0.5, 0.95))
        color = "#3b6ea5" if name == "censored" else "black"
        right.plot([low, high], [row, row], color=color, lw=2)
        right.plot(mid, row, "o", color=color)
    right.axvline(RATE, color="#b5482f", ls="--", lw=1)
    right.set(yticks=range(len(rates)), yticklabels=list(rates), xlabel="clearance rate (per hour)")
    right.set(title="Median and 90 % interval; dashed: the truth")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    pyro.set_rng_seed(0)
    times, y = simulate(4 if smoke else 12)
    below = float((y <= torch.tensor(LIMIT).log()).float().mean())
    print(f"{below:.0%} of the readings are at or below {LIMIT} mg/l; the true rate is {RATE} per hour")
    rates, forecast = {}, None
    for name, data in treatments(times, y).items():
        guide = sd.AmortizedGuide(model)
        fit = sd.fit(model, guide, data, steps=3 if smoke else 150, lr=0.03, progress=False)
        found = sd.predict(fit, data, draws=20 if smoke else 1000)
        rates[name] = found.latents["rate"].flatten()
        low, mid, high = (float(rates[name].quantile(q)) for q in (0.05, 0.5, 0.95))
        error = float(found.latents["error"].quantile(0.5))
        print(f"{name:15s} rate {mid:.3f} [{low:.3f}, {high:.3f}]  error {error:.2f}  ELBO {fit.elbo:.1f}")
        if name == "censored":
            forecast = found
    out.mkdir(parents=True, exist_ok=True)
    plot(out / "censored.png", times, y, rates, forecast)
    print(f"Wrote {out / 'censored.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Readings below a limit: dropped, replaced, or censored.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
