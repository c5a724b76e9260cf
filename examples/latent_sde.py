# %% [markdown]
# # Noise that depends on the state: what does my sensor not tell, and how sure may I be?
#
# Twenty buoys measure the same kind of signal at irregular times, with an error, and with holes of hours. It is calm
# when it is low and restless when it is high, which nobody told the model: a latent SDE learns drift and diffusion from
# the data. The question is whether its intervals, in the holes and ahead, are wide where the signal is restless and
# narrow where it is calm, and whether they hold what they promise. The data are simulated, so the answer is known.

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn

import stochdyn as sd

ERROR = 0.05


# %% [markdown]
# The truth: a double-sided pull to the middle, and a noise five times as large on the right as on the left.


# %%
def pull(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * z - 0.5 * z**3


def restlessness(z: torch.Tensor) -> torch.Tensor:
    return 0.2 + 0.8 * torch.sigmoid(4 * z)


def simulate(buoys: int, hours: int) -> tuple[sd.Series, torch.Tensor]:
    """The series with a hole of its own and an unseen end, and the true states."""
    gaps = 0.1 + 0.3 * torch.rand(buoys, 4 * hours, dtype=torch.float64)
    times = gaps.cumsum(-1)
    grid = sd.TimeGrid(times, substeps=10)
    path = sd.SDEPath(lambda t, z: pull(z), lambda t, z: restlessness(z), torch.zeros(buoys, 1), grid.ts)
    states = grid.observed(path.sample())
    hole = hours / 4 + hours / 3 * torch.rand(buoys, 1)
    seen = ((times < hole) | (times > hole + 2.0)) & (times < 0.8 * times[:, -1:])
    values = states + ERROR * torch.randn_like(states)
    return sd.Series(times, values, seen, channels=["signal"]), states


# %% [markdown]
# The model: `LatentSDE` with one state, which is the signal itself (an identity decoder), so that what it learns has
# the units of the data. The measurement error is learned too. The guide begins at the information filter: with the
# `FreeMessage()` of `LatentSDE` 300 steps were not enough, and all movement was taken for measurement error.


# %%
def latent_sde() -> sd.LatentSDE:
    decoder = sd.NormalDecoder(nn.Identity(), 1)
    return sd.LatentSDE(1, 1, hidden=32, decoder=decoder, paths=sd.FilterMessage())


def held(prediction: sd.Prediction, data: sd.Series, states: torch.Tensor) -> list[str]:
    """How often the central 90 % interval of the state holds the truth where nothing was seen, and its width."""
    low, high = prediction.states.quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside, width, unseen = (low <= states) & (states <= high), high - low, ~data.mask
    ahead = (data.times > data.last_observed[:, None])[..., None]
    lines = []
    for place, where in (("in the holes", unseen & ~ahead), ("ahead", unseen & ahead)):
        for kind, half in (("calm", states < 0), ("restless", states >= 0)):
            some = where & half
            share, size = inside[some].double().mean(), width[some].mean()
            lines.append(
                f"{place}, {kind}: the 90 % interval holds the truth at {share:.0%}, width {size:.2f}"
            )
    return lines


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    data, states = simulate(6 if smoke else 20, 10 if smoke else 15)
    model = latent_sde()
    fit = sd.fit(model, model.guide, data, steps=5 if smoke else 300, lr=2e-2)
    print(fit)
    print(f"measurement error {model.decoder.log_scale.exp().item():.3f}, in truth {ERROR}")

    prediction = sd.predict(fit, data, draws=50 if smoke else 400)
    print("\n".join(held(prediction, data, states)))

    reading = sd.read_field(fit, data, draws=20)
    everywhere = prediction.states.flatten(1, 2)
    points = torch.linspace(-1.8, 1.8, 121)[:, None]
    reading = sd.read_field(fit, data, points, draws=20)
    reading = sd.FieldReading(points, reading.drift, reading.diffusion, everywhere, (0,), (121,))
    _, axes = plt.subplots(3, 1, figsize=(7, 8.5), layout="constrained")
    sd.plot_forecast(prediction, states=True, truth=states, time_label="hours", axes=axes[:1])
    axes[0].set_ylabel("signal")
    sd.plot_field(reading, drift=pull, diffusion=restlessness, names=["signal"], axes=axes[1:])
    out.mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig(out / "latent_sde.png", dpi=150)
    print(f"Wrote {out / 'latent_sde.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A latent SDE whose noise depends on the state.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
