# %% [markdown]
# # Visits that come more often when patients are ill
#
# A patient's state wanders, and is measured with an error when the patient comes. Patients come more often when they
# are ill, so the times are informative: a reading is more likely high, and a gap without visits says that all was well.
# The question: what becomes of the average state, and of each patient's state between visits, when a model takes the
# times as given? And what when it models them, as a point process whose log intensity is linear in the state?

# %%
import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import stochdyn as sd

TRUTH = {"mean": 0.0, "rate": 0.5, "spread": 1.0, "error": 0.3, "often": 0.5}
double = partial(torch.tensor, dtype=torch.float64)  # a visit may be very close to a time of the grid
END, STEP = 20.0, 0.2  # months watched; the longest step of the grid

# %% [markdown]
# The state is an Ornstein-Uhlenbeck process around `mean` with stationary standard deviation `spread`. Visits per month
# are `often * exp(pull * state)`. The model that takes the times as given is the same without the visits.
#
# The likelihood of the visits needs the path in long gaps too, and from the last visit to the end of the window. So the
# grid has times of its own between the visits (`through=`), and every series ends in a row at END with nothing
# observed. Between grid times the log intensity is a line: that alone raises `pull` by up to rate * STEP / 3 of itself.


# %%
@dataclass(frozen=True)
class Model:
    """With or without the visits as data; the grid is the same for both."""

    joint: bool

    def __call__(self, batch: sd.Series) -> None:
        mean = pyro.sample("mean", dist.Normal(double(0.0), 2.0))
        rate = pyro.sample("rate", dist.LogNormal(double(-0.5), 0.7))
        spread = pyro.sample("spread", dist.LogNormal(double(0.0), 0.7))
        error = pyro.sample("error", dist.LogNormal(double(-1.0), 0.7))
        if self.joint:  # before the path, so that its guide sees them
            often = pyro.sample("often", dist.LogNormal(double(-0.5), 1.0))
            pull = pyro.sample("pull", dist.Normal(double(0.0), 1.0))
        through = torch.arange(1, round(END / STEP)) * STEP
        grid = sd.TimeGrid(batch.times, substeps=1, start=0.0, through=through)
        start = dist.Normal(mean[..., None], spread[..., None]).to_event(1)
        with batch.plate("patient"):
            drift = lambda t, z: rate[..., None] * (mean[..., None] - z)  # noqa: E731
            noise = (spread * (2 * rate).sqrt())[..., None]
            solver = sd.ExponentialEuler(-rate[..., None])  # exact for this drift
            z = pyro.sample("z", sd.SDEPath(drift, noise, start, grid.ts, solver=solver))
            batch.observe("y", dist.Normal(grid.observed(z), error[..., None, None]))
            if self.joint:
                log_intensity = often.log()[..., None] + pull[..., None] * z[..., 0]
                visits = sd.Jumps.of_times(batch, 0.0, END)
                visits.observe("visits", sd.CoxProcess(log_intensity, grid.ts, t1=END))


# %% [markdown]
# Patients are simulated on a grid ten times as fine. With `pull=0` the times say nothing about the state.


# %%
@dataclass(frozen=True)
class Study:
    data: sd.Series
    ts: Tensor  # the fine grid
    states: Tensor  # (patient, time) the truth on it


def simulate(patients: int, pull: float, seed: int) -> Study:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ts = torch.linspace(0.0, END, 401).double()
        mean, rate, spread, error, often = (double(x) for x in TRUTH.values())
        path = sd.SDEPath(
            lambda t, z: rate * (mean - z),
            (spread * (2 * rate).sqrt())[None],
            dist.Normal(mean[None], spread).to_event(1),
            ts,
            solver=sd.ExponentialEuler(-rate[None]),
        )
        states = path.rsample((patients,))[..., 0]
        visits = sd.CoxProcess(often.log() + pull * states, ts).sample()[..., 0]
        rows = []
        for state, times in zip(states, visits, strict=True):
            times = times[torch.isfinite(times)]
            after = torch.searchsorted(ts, times).clamp(1, len(ts) - 1)
            share = (times - ts[after - 1]) / (ts[after] - ts[after - 1])
            y = torch.lerp(state[after - 1], state[after], share) + error * torch.randn(len(times)).to(times)
            end = double([END])
            seen = torch.arange(len(times) + 1) < len(times)
            rows.append((torch.cat([times, end]), torch.cat([y, 0 * end])[:, None], seen))
    return Study(sd.Series.from_list(rows), ts, states)


# %% [markdown]
# Both models are fitted in the same way, without an encoder: it would read what was observed, and nothing in a gap. The
# guide's messages come from the likelihood of the whole path, gaps included.


# %%
@dataclass(frozen=True)
class Found:
    """A posterior: draws of the parameters, and of the states on the grid."""

    parameters: dict[str, Tensor]
    ts: Tensor
    states: Tensor  # (draw, patient, time)

    def interval(self, name: str) -> tuple[float, float, float]:
        low, mid, high = (float(self.parameters[name].quantile(q)) for q in (0.05, 0.5, 0.95))
        return low, mid, high


def fitted(study: Study, joint: bool, steps: int, draws: int) -> Found:
    pyro.set_rng_seed(0)
    model = Model(joint)
    fit = sd.fit(model, sd.AmortizedGuide(model), study.data, steps=steps, lr=0.03, progress=False)
    posterior = sd.predict(fit, study.data, draws=draws)
    parameters = {name: x.flatten() for name, x in posterior.latents.items() if name != "z"}
    return Found(parameters, posterior.grids["z"], posterior.latents["z"][..., 0])


def between(study: Study, found: Found) -> tuple[float, float]:
    """Of the states a month or more from every visit: mean error of the posterior mean, cover of 90 % intervals."""
    after = torch.searchsorted(study.ts, found.ts.contiguous()).clamp(1, len(study.ts) - 1)
    share = (found.ts - study.ts[after - 1]) / (study.ts[after] - study.ts[after - 1])
    truth = torch.lerp(study.states.gather(1, after - 1), study.states.gather(1, after), share)
    visits = sd.Jumps.of_times(study.data, 0.0, END).times
    far = ((found.ts[..., None] - visits[:, None]).abs() > 1).all(-1)
    far &= torch.nn.functional.pad(found.ts.diff(dim=-1) > 0, (1, 0), value=True)  # no padding
    low, high = found.states.quantile(0.05, 0), found.states.quantile(0.95, 0)
    error, inside = found.states.mean(0) - truth, (low < truth) & (truth < high)
    return float(error[far].mean()), float(inside[far].float().mean())


def report(name: str, study: Study, found: Found) -> None:
    error, cover = between(study, found)
    low, mid, high = found.interval("mean")
    print(
        f"{name:15s} mean {mid:5.2f} [{low:5.2f}, {high:5.2f}], between visits off by {error:5.2f}, cover {cover:.0%}"
    )
    if "pull" in found.parameters:
        low, mid, high = found.interval("pull")
        print(f"{'':15s} pull {mid:5.2f} [{low:5.2f}, {high:5.2f}]")


# %%
def plot(path: Path, study: Study, found: dict[str, Found]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(2, 1))
    visits = sd.Jumps.of_times(study.data, 0.0, END)
    edges = torch.nn.functional.pad(visits.times.clamp(max=END), (1, 1), value=END)
    edges[:, 0] = 0.0
    patient = int(
        torch.where(visits.counts > 5, edges.diff(dim=-1).amax(-1), 0.0).argmax()
    )  # the longest gap
    colors = dict(zip(found, ("#b5482f", "#3b6ea5"), strict=True))
    left.plot(study.ts, study.states[patient], color="black", lw=0.8, label="truth")
    for name, each in found.items():
        z, ts = each.states[:, patient], each.ts[patient]
        left.fill_between(ts, z.quantile(0.05, 0), z.quantile(0.95, 0), color=colors[name], alpha=0.2, lw=0)
        left.plot(ts, z.mean(0), color=colors[name], label=f"times {name}")
        right.hist(
            each.parameters["mean"], 25, color=colors[name], alpha=0.6, density=True, label=f"times {name}"
        )
    seen = study.data.mask[patient, :, 0]
    times, y = study.data.times[patient][seen], study.data.values[patient][seen]
    left.plot(times, y, "o", color="black", ms=4, label="readings")
    left.set(xlabel="months", ylabel="state", title="One patient: mean and 90 % interval")
    left.legend(fontsize="small")
    right.axvline(TRUTH["mean"], color="black", ls="--", lw=1, label="truth")
    right.set(xlabel="average state", yticks=[], title="Posterior of the average")
    right.set(ylim=(0, 1.35 * right.get_ylim()[1]))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=150)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    patients, steps, draws = (4, 3, 20) if smoke else (40, 200, 500)
    for pull in (1.0, 0.0):
        study = simulate(patients, pull, seed=1)
        y = study.data.values[study.data.mask]
        count, average = len(y), float(y.mean())
        print(
            f"pull {pull:g}: {count} readings with mean {average:.2f}; the average state is {TRUTH['mean']:.2f}"
        )
        found = {
            name: fitted(study, name == "modelled", steps, draws) for name in ("taken as given", "modelled")
        }
        for name, each in found.items():
            report(name, study, each)
        if pull:
            out.mkdir(parents=True, exist_ok=True)
            plot(out / "informative_times.png", study, found)
    print(f"Wrote {out / 'informative_times.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Observation times that depend on the state, taken as given or modelled."
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
