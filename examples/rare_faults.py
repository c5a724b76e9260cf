# %% [markdown]
# # How often does each machine fail, also one that never did?
#
# Six hundred machines were watched for months of their own, and most have a few faults or none. Each has a rate of
# faults; an encoder reads a machine's record and gives the posterior of its rate, also of machines never seen. Where
# there are no faults that posterior is skewed: rates near zero are as good as any. A Gaussian message cannot say so,
# `sd.LocalFlow` can. The exact posterior is known here (a Gamma), to compare with.
#
# Run: `python examples/rare_faults.py` (some minutes).


# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

SHAPE, SPEED = torch.tensor([2.0, 1.5], dtype=torch.float64)  # of the prior: a mean of 1.3 faults in a month

# %% [markdown]
# The model: a rate for each machine, and faults at that rate while it was watched.


# %%
def model(batch: sd.Jumps) -> None:
    with batch.plate("machine"):
        rate = pyro.sample("rate", dist.Gamma(SHAPE, SPEED))
        batch.observe("faults", sd.PoissonProcess(rate, batch.t0, batch.t1))


def simulate(machines: int, seed: int) -> sd.Jumps:
    torch.manual_seed(seed)
    months = 2 + 6 * torch.rand(machines, dtype=torch.float64)
    rates = dist.Gamma(SHAPE, SPEED).sample((machines,))
    return sd.Jumps(sd.PoissonProcess(rates, 0.0, months).sample(), 0.0, months)


def exact(batch: sd.Jumps) -> dist.Gamma:
    return dist.Gamma(SHAPE + batch.counts, SPEED + batch.t1)


# %% [markdown]
# Two guides that differ in one word. `"machine"` is the prior times a Gaussian message in the logarithm of the rate,
# `sd.LocalFlow("machine")` that seen through splines that read the record too.


# %%
def fitted(kind: str | sd.LocalFlow, data: sd.Jumps, steps: int) -> tuple[sd.AmortizedGuide, sd.Fit]:
    torch.manual_seed(0)
    guide = sd.AmortizedGuide(
        model, sd.SetEncoder(obs_dim=1, hidden=32, time_unit=4.0).double(), amortize={"rate": kind}
    )
    fit = sd.fit(model, guide, data, steps=steps, lr=5e-3, batch_size=150)
    guide.eval()
    return guide, fit


def log_evidence(data: sd.Jumps) -> float:
    shape, speed = SHAPE + data.counts, SPEED + data.t1
    return float((SHAPE * SPEED.log() + torch.lgamma(shape) - shape * speed.log()).sum())


def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    data = simulate(200 if smoke else 600, seed=0)
    new = sd.Jumps.from_list([[], [1.3], [0.4, 1.1, 1.2, 2.9, 3.3, 4.8, 4.9]], t0=0.0, t1=5.0)
    draws = 500 if smoke else 4000
    reference = exact(new).sample((draws,))
    kinds = {"Gaussian message": "machine", "flow": sd.LocalFlow("machine")}
    found = {}
    for name, kind in kinds.items():
        guide, fit = fitted(kind, data, 20 if smoke else 3000)
        print(f"{name}: ELBO {(fit.elbo - log_evidence(data)) / len(data):+.4f} of the evidence, per machine")
        with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
            found[name] = guide(new)["rate"]
        for k, count in enumerate(new.counts.tolist()):
            told = sd.c2st(reference[:, k], found[name][:, k]).accuracy
            print(f"  {count} faults in 5 months: told from the exact posterior {told:.1%} of the time")
    draw(found, new, out)


# %% [markdown]
# A classifier that guesses is right half of the time. The picture: the rate's logarithm, where the left tail of a
# machine without faults is long.


# %%
def draw(found: dict[str, torch.Tensor], new: sd.Jumps, out: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(new), figsize=(11, 3.6), sharex=True, layout="constrained")
    grid = torch.linspace(-5, 2, 300)
    for k, axis in enumerate(axes):
        posterior = exact(new[[k]])
        axis.plot(
            grid, (posterior.log_prob(grid.exp()[:, None])[:, 0] + grid).exp(), "k", lw=1, label="exact"
        )
        for name, rates in found.items():
            axis.hist(rates[:, k].log(), 60, range=(-5, 2), density=True, histtype="step", label=name)
        axis.set(title=f"faults in 5 months: {int(new.counts[k])}", xlabel="log rate", yticks=[])
    axes[0].legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "rare_faults.png", dpi=150)
    plt.close(figure)
    print(f"Wrote {out / 'rare_faults.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Amortised posteriors of rates, skewed where faults are few."
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
