# %% [markdown]
# # How does a jump change what comes next?
#
# Sequences of spikes whose law is not known: each spike holds the next ones back for a while, and the more so the more
# there were. No classical family fits: a Hawkes process excites, and a self-correcting one never forgets. A neural jump
# ODE learns it: a state flows between jumps, jumps with them, and a network reads the intensity off it. The data are
# simulated, so that the intensity found can be held against the exact one.
#
# Run: `python examples/neural_jump_ode.py`.

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import pyro
import torch

import stochdyn as sd

END = 50.0


# %%
def inhibited(t, history):
    """softplus(1 - 2 sum of exp(-lag)): relief that fades."""
    return torch.nn.functional.softplus(1 - history.sum(lambda lag: 2 * torch.exp(-lag)))


truth = sd.PointProcess(inhibited, 0.0, END, bound=1.32)


# %% [markdown]
# ## The model
# Two coordinates: one integrates, one decays on a learned scale of time. What the network makes of them is learned too.


# %%
class Model(torch.nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.process = sd.NeuralJumpODE(2, (16,), rate=rate, step=1.0).double()

    def forward(self, batch: sd.Jumps) -> None:
        with batch.plate("series"):
            batch.observe("jumps", self.process(batch))


# %%
def plot(path: Path, one: sd.Jumps, learned: sd.JumpODE, tests: dict[str, sd.TimeRescaling]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ts = torch.linspace(0, 20, 1000, dtype=torch.float64)
    left.plot(ts, truth.intensity(ts, one)[0], color="black", lw=1, label="exact")
    left.plot(ts, learned.intensity(ts, one)[0], color="#b5482f", lw=1.2, label="found")
    seen = one.times[0][one.times[0] < 20]
    left.plot(seen, torch.zeros_like(seen), "|", color="black", ms=10)
    left.set(xlabel="time", ylabel="intensity", title="One new sequence; ticks: jumps")
    left.legend(frameon=False)
    for (name, found), color in zip(tests.items(), ("#b5482f", "#3b6ea5"), strict=True):
        sd.plot_time_rescaling(found, ax=right)
        right.lines[-1].set(color=color, label=name)
    right.set_title("Time rescaling")
    shown = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    right.legend(shown.values(), shown.keys(), frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    pyro.set_rng_seed(0)
    count = 6 if smoke else 100
    jumps, new = (sd.Jumps(truth.sample((n,)), 0.0, END) for n in (count, max(count // 3, 2)))
    rate = float(jumps.counts.sum()) / (count * END)
    model = Model(rate)
    steps = 5 if smoke else 600
    sd.fit(
        model,
        sd.AmortizedGuide(model),
        jumps,
        steps=steps,
        lr=0.02,
        batch_size=min(count, 25),
        progress=False,
    )
    with torch.no_grad():
        learned = model.process(new, nodes=None)
        tests = {
            "found": sd.time_rescaling(learned, new),
            "Poisson": sd.time_rescaling(sd.PoissonProcess(rate, 0.0, END), new),
        }
        ts = torch.linspace(0, END, 501, dtype=torch.float64)
        exact = truth.intensity(ts, new)
        error = 100 * float(((learned.intensity(ts, new) - exact).abs() / exact).mean())
        constant = 100 * float(((rate - exact).abs() / exact).mean())
        print(f"error of the intensity {error:.1f} %, of a constant one {constant:.1f} %")
        for name, found in tests.items():
            print(f"{name:8s} {found}")
        out.mkdir(parents=True, exist_ok=True)
        plot(out / "neural_jump_ode.png", new[[0]], model.process(new[[0]], nodes=None), tests)
    print(f"Wrote {out / 'neural_jump_ode.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="A learned point process on spikes that hold each other back."
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
