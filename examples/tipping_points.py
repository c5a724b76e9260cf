# %% [markdown]
# # Does my system have alternative stable states?
#
# A pasture is grazed. May (1977) showed that grass which grows logistically, eaten by a herd that is soon full, may
# have two stable states at the same stocking: rich and overgrazed. Between them is a tipping point. Here the biomass
# of plots of such a pasture is simulated with noise and measured; a drift of unknown form is learned from it, and its
# fixed points are read with their posterior. The truth is known, and is drawn beside.
#
# May, "Thresholds and breakpoints in ecosystems with a multiplicity of stable states", 1977,
# https://doi.org/10.1038/269471a0

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

GROWTH, CAPACITY, GRAZING = 1.0, 10.0, 2.0
NOISE, ERROR = 0.35, 0.1
CENTRES = torch.linspace(-2.5, 3.5, 13)


# %% [markdown]
# The state is the log of the biomass, so that noise is a share of it. The fixed points are those of the biomass.


# %%
def grazed(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    biomass = z.exp()
    return GROWTH * (1 - biomass / CAPACITY) - GRAZING * biomass / (1 + biomass**2)


def simulate(plots: int, years: int) -> sd.Series:
    times = torch.arange(0.0, years, 0.5, dtype=torch.float64)
    grid = sd.TimeGrid(times, substeps=20)
    start = torch.linspace(-1.5, 2.3, plots)[:, None]
    z = grid.observed(sd.SDEPath(grazed, torch.tensor([NOISE]), start, grid.ts).sample())
    return sd.Series(times, z + ERROR * torch.randn_like(z), channels=["log biomass"])


# %% [markdown]
# The model knows nothing of grass and cows. Its drift is a sum of smooth bumps whose weights are sampled, so that the
# posterior of the drift is that of the weights; a term that leads back keeps paths from leaving. A net's weights would
# be trained to one value, and there would be no posterior to read.


# %%
def model(batch: sd.Series) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(len(CENTRES)), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))

    def drift(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        bumps = torch.exp(-0.5 * ((z - CENTRES) / 0.6) ** 2)
        return (bumps * weights).sum(-1, keepdim=True) - 0.1 * (z - 0.5) ** 3

    grid = sd.TimeGrid(batch.times, substeps=2)
    with batch.plate("plot"):
        start = dist.Normal(torch.zeros(1), 2.0).to_event(1)
        z = pyro.sample("z", sd.SDEPath(drift, lambda t, z: noise[..., None] + 0 * z, start, grid.ts))
        seen = dist.Normal(grid.observed(z), ERROR).mask(batch.mask).to_event(2)
        pyro.sample("log_biomass", seen, obs=batch.values)


# %% [markdown]
# Every draw of the posterior is a drift of its own, with its own fixed points. They are matched across draws, and the
# share of draws that has each is the posterior probability of it. So the answer to the question is a probability.


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    data = simulate(plots=4 if smoke else 12, years=10 if smoke else 30)
    guide = sd.AmortizedGuide(model)
    fit = sd.fit(model, guide, data, steps=5 if smoke else 150, lr=0.02)
    print(fit)

    fields = sd.posterior_fields(fit, data, draws=20 if smoke else 200)
    starts = torch.linspace(-2.0, 2.7, 40)[:, None]
    found = sd.fixed_points(fields.drift, starts)
    print(found)
    truth = sd.fixed_points(grazed, starts.double())
    print("truth:", ", ".join(f"{p.kind} at {p.location.item():.2f}" for p in truth.points))
    stable = sum(
        (torch.bincount(torch.as_tensor(p.draw), minlength=found.draws) * p.kind.startswith("stable"))
        for p in found.points
    )
    share = (torch.as_tensor(stable) >= 2).double().mean() if found.points else 0.0
    print(f"probability of alternative stable states: {float(share):.2f}")

    # One series is read for its parameters, which all share; the states are those of all.
    everywhere = sd.predict(fit, data, draws=fields.draws).states.flatten(1, 2)
    reading = sd.read_field(fields, data, torch.linspace(-2.2, 2.9, 121)[:, None])
    reading = sd.FieldReading(reading.points, reading.drift, reading.diffusion, everywhere, (0,), (121,))
    axes = sd.plot_field(
        reading,
        drift=lambda z: grazed(z, z),
        diffusion=lambda z: NOISE + 0 * z,
        names=["log biomass"],
    )
    sd.plot_fixed_points(found, axes[0])
    out.mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig(out / "tipping_points.png", dpi=150)
    print(f"Wrote {out / 'tipping_points.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Alternative stable states of a grazed pasture.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
