# %% [markdown]
# # Theophylline: how fast does each patient absorb and clear a drug that was swallowed?
#
# Twelve patients swallow one dose of theophylline; its concentration in the blood is measured eleven times in a day
# (Boeckmann, Sheiner & Beal 1994, the data of R's `Theoph`). A dose jumps into the gut, is absorbed into the blood, and
# cleared: each patient with rates of its own, which are alike. The dose acts a little after it was swallowed; that lag
# is learned too, through the time of a jump.
#
# The data are not part of this project. `STOCHDYN_DATA` names the folder of `theophylline.csv` with columns Subject,
# Wt, Dose, Time, conc; without it, patients are simulated.

# %%
import argparse
import os
from pathlib import Path

import matplotlib as mpl
import pandas
import pyro
import pyro.distributions as dist
import torch

import stochdyn as sd

SOLVER = sd.Dopri5(rtol=1e-4, atol=1e-4)
NAMES = ("absorption", "clearance", "volume")


# %% [markdown]
# The body has two compartments, amounts in mg per kg: what is left in the gut, and what is in the blood. Concentrations
# are amounts over the volume of distribution.


# %%
def body(ka: torch.Tensor, ke: torch.Tensor) -> sd.fields.Field:
    def field(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gut, blood = z.unbind(-1)
        return torch.stack(torch.broadcast_tensors(-ka * gut, ka * gut - ke * blood), -1)

    return field


def concentration(
    rates: torch.Tensor, lag: torch.Tensor, doses: sd.Doses, times: torch.Tensor
) -> torch.Tensor:
    """(*batch, time, 1) from log absorption, clearance and volume (*batch, 3)."""
    ka, clearance, volume = rates.exp().unbind(-1)
    given = doses.adjusted(lag=lag)
    z = sd.odeint(body(ka, clearance / volume), torch.zeros(2), times, jumps=[given], solver=SOLVER)
    return z[..., 1:] / volume[..., None, None]


# %% [markdown]
# The model: log rates of a patient are normal around the population's. The guide is one joint normal over everything,
# with a full covariance: absorption, volume and lag share what the first hour says.


# %%
class Theophylline:
    def __init__(self, doses: sd.Doses) -> None:
        self.doses = doses

    def __call__(self, batch: sd.Series) -> None:
        centre = torch.tensor([0.4, -3.2, -0.7])
        level = pyro.sample("level", dist.Normal(centre, 1.0).to_event(1))
        spread = pyro.sample("spread", dist.LogNormal(torch.tensor([-1.0, -1.0, -1.5]), 0.5).to_event(1))
        lag = pyro.sample("lag", dist.LogNormal(-2.5, 0.7))
        error = pyro.sample("error", dist.LogNormal(-0.7, 0.5))
        doses = self.doses[batch.index]
        with batch.plate("patient"):
            own = pyro.sample("own", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            rates = level + spread * own
            pyro.deterministic("rates", rates.exp(), event_dim=1)
            curve = concentration(rates, lag.expand(rates.shape[:-1]), doses, batch.times)
            pyro.deterministic("curve", curve, event_dim=2)
            seen = dist.Normal(curve, error[..., None, None]).mask(batch.mask).to_event(2)
            pyro.sample("concentration", seen, obs=batch.values)


# %%
def load() -> tuple[sd.Series, sd.Doses, str]:
    folder = os.environ.get("STOCHDYN_DATA")
    path = None if folder is None else Path(folder) / "theophylline.csv"
    if path is None or not path.exists():
        return *simulate(), "simulated"
    frame = pandas.read_csv(path)
    data = sd.Series.from_frame(frame, time="Time", values="conc", series="Subject")
    table = frame.groupby("Subject", as_index=False).first()
    events = pandas.DataFrame(
        {"ID": table["Subject"], "TIME": 0.0, "AMT": table["Dose"], "CMT": "gut", "EVID": 1}
    )
    return data, sd.Doses.from_frame(events, "ID", compartments=["gut", "blood"], ids=data.ids), "measured"


def simulate() -> tuple[sd.Series, sd.Doses]:
    torch.manual_seed(3)
    times = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 9.0, 12.0, 24.0])
    rates = torch.tensor([0.4, -3.2, -0.75]) + torch.tensor([0.6, 0.25, 0.15]) * torch.randn(12, 3)
    doses = sd.Doses([[sd.Dose(0.0, 4.5, "gut")]] * 12, compartments=["gut", "blood"])
    curve = concentration(rates, torch.tensor(0.1), doses, times)
    return sd.Series(times, curve + 0.5 * torch.randn_like(curve)), doses


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    pyro.set_rng_seed(0)
    data, doses, kind = load()
    print(f"{len(data)} patients, {kind}")
    model = Theophylline(doses)
    guide = sd.AmortizedGuide(model)
    fit = sd.fit(model, guide, data, steps=3 if smoke else 200, lr=0.06)
    print(fit)

    draws = 10 if smoke else 200
    latents = sd.predict(fit, data, draws=draws).latents
    level, lag = latents["level"].reshape(draws, 3).exp(), latents["lag"].reshape(draws)
    for name, x, unit in zip(
        (*NAMES, "lag"), (*level.unbind(-1), lag), ("1/h", "L/h/kg", "L/kg", "h"), strict=True
    ):
        low, middle, high = x.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        print(f"{name:<11} {middle:.3f} {unit:<7} [{low:.3f}, {high:.3f}]")
    half = 0.693 * (level[:, 2] / level[:, 1]).median()
    print(f"half-life in the blood {half:.1f} h")
    curves = smooth(latents, doses, draws)
    plot(data, curves, out)


def smooth(
    latents: dict[str, torch.Tensor], doses: sd.Doses, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The posterior of each patient's curve between the measurements."""
    times = torch.cat([torch.linspace(0, 3, 31), torch.linspace(3.5, 24.5, 43)])
    rates, lag = latents["rates"].log().reshape(draws, -1, 3), latents["lag"].reshape(draws, 1)
    with torch.no_grad():
        return times, concentration(rates, lag.expand(rates.shape[:-1]), doses, times)[..., 0]


def plot(data: sd.Series, curves: tuple[torch.Tensor, torch.Tensor], out: Path) -> None:
    from matplotlib import pyplot as plt

    times, draws = curves
    figure, axes = plt.subplots(3, 4, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    for k, axis in enumerate(axes.flat):
        low, middle, high = draws[:, k].quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
        axis.fill_between(times, low, high, alpha=0.3, lw=0)
        axis.plot(times, middle)
        own = data.times[k] if data.times.ndim > 1 else data.times
        seen = data.mask[k, :, 0]
        axis.plot(own[seen], data.values[k, seen, 0], "ko", ms=3)
        axis.set_title(f"patient {data.ids[k]}", fontsize=9)
    figure.supxlabel("hours after the dose")
    figure.supylabel("theophylline in the blood, mg/L; 90 % intervals")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "theophylline.png", dpi=150)
    plt.close(figure)
    print(f"Wrote {out / 'theophylline.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Absorption and clearance of theophylline in twelve patients."
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
