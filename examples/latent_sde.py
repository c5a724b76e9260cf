# %% [markdown]
# # Noise that depends on the state: how sure may I be where I did not measure?
#
# Two hundred buoys measured the same kind of signal at irregular times, with an error. The signal is calm when it is
# low and restless when it is high, which nobody told the model: a latent SDE learns drift and diffusion from the
# data. Three hundred other buoys each have a hole of two hours, and nothing is seen of their last fifth. Are the
# intervals there narrow where the signal is calm and wide where it is restless, and do they hold the truth as often
# as they say? The data are simulated, so the answer is known.

# %%
import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

import stochdyn as sd

ERROR, START = 0.1, 0.8


# %% [markdown]
# The truth: a pull to the middle, and a noise that is three times as large on the right as on the left.


# %%
def pull(z: Tensor) -> Tensor:
    return -0.6 * z


def restlessness(z: Tensor) -> Tensor:
    return 0.4 + 0.8 * torch.sigmoid(1.5 * z)


def simulate(buoys: int, readings: int, *, holes: bool) -> tuple[sd.Series, Tensor]:
    """The series, each with a hole of its own and an unseen end or with neither, and the true states."""
    times = (0.1 + 0.2 * torch.rand(buoys, readings, dtype=torch.float64)).cumsum(-1)
    grid = sd.TimeGrid(times, substeps=20)
    start = START * torch.randn(buoys, 1)
    path = sd.SDEPath(lambda t, z: pull(z), lambda t, z: restlessness(z), start, grid.ts)
    states = grid.observed(path.sample())
    values = states + ERROR * torch.randn_like(states)
    seen = torch.ones_like(times, dtype=torch.bool)
    if holes:
        end = 0.8 * times[:, -1:]
        hole = 0.5 + (end - 3.0).clamp(min=0) * torch.rand(buoys, 1)
        seen = ((times < hole) | (times > hole + 2.0)) & (times < end)
    return sd.Series(times, values, seen, channels=["signal"]), states


# %% [markdown]
# The model: `LatentSDE` with one state, which is the signal itself (an identity decoder), so that what it learns has
# the units of the data. The error of the measurements is learned too. `FilterMessage(learned=False)` makes the guide
# a smoother that follows the model as it changes: it has nothing of its own to train, and serves buoys never seen.
#
# Beside it are two others: the same with a noise of one learned size, and one that knows the truth and learns
# nothing.


# %%
class Known(nn.Module):
    """A field that is not learned."""

    def __init__(self, field: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(z)


class Constant(nn.Module):
    """A noise of one size, whatever the state."""

    def __init__(self) -> None:
        super().__init__()
        self.log_size = nn.Parameter(torch.zeros(1))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.log_size.exp().expand_as(z)


def latent_sde(diffusion: nn.Module, drift: nn.Module | None = None) -> sd.LatentSDE:
    process = sd.NeuralSDE(1, 32, drift=drift, diffusion=diffusion)
    decoder = sd.NormalDecoder(nn.Identity(), 1, scale=0.2)
    return sd.LatentSDE(1, 1, process=process, decoder=decoder, paths=sd.FilterMessage(learned=False))


def trained(diffusion: nn.Module, data: sd.Series, steps: int) -> sd.Fit:
    model = latent_sde(diffusion)
    return sd.fit(model, model.guide, data, steps=steps, lr=5e-2, progress=False)


def informed() -> sd.Fit:
    """The true model, with nothing left to learn."""
    model = latent_sde(Known(restlessness), Known(pull))
    with torch.no_grad():
        model.process.start_log_scale.fill_(START).log_()
        model.decoder.log_scale.fill_(ERROR).log_()
    return sd.Fit(model, model.guide)


# %% [markdown]
# The points are sorted by what was *predicted*: the median below or above 0. Sorted by the true state, even the true
# model looks wrong, since states far out are those that surprise: the line after the table shows by how much. The
# rows of the true model are the yardstick: where they are below 90 %, learning is not to blame.


# %%
def share(inside: Tensor, some: Tensor) -> str:
    """In per cent with its standard error, over buoys: the times of one buoy are not independent."""
    hits, count = ((x & some).sum((1, 2)).double() for x in (inside, some))
    ratio = hits.sum() / count.sum()
    error = (hits - ratio * count).square().sum().sqrt() / count.sum()
    return f"{ratio:.1%} +- {error:.1%}"


def coverage(name: str, fit: sd.Fit, data: sd.Series, states: Tensor, draws: int) -> sd.Prediction:
    """Prints how often the central 90 % interval of the state holds the truth where nothing was seen, and its width."""
    prediction = sd.predict(fit, data, draws=draws)
    low, median, high = prediction.states.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    inside, unseen = (low <= states) & (states <= high), ~data.mask
    ahead = (data.times > data.last_observed[:, None])[..., None]
    for place, where in (("in the holes", unseen & ~ahead), ("ahead", unseen & ahead)):
        for kind, half in (("calm", median < 0), ("restless", median >= 0)):
            some = where & half
            width = (high - low)[some].mean()
            print(f"{name:12s} {place:12s} {kind:8s} {share(inside, some)}, width {width:.2f}")
    if name == "true":
        print(
            f"{name}, in the holes, where the true state is above 0: {share(inside, unseen & ~ahead & (states >= 0))}"
        )
    return prediction


def read(fit: sd.Fit, data: sd.Series, prediction: sd.Prediction) -> sd.FieldReading:
    """The learned drift and diffusion on a line, printed beside the truth at three points."""
    line = torch.linspace(-2.0, 2.4, 111)[:, None]
    reading = sd.read_field(fit, data, line, draws=1)
    for name, learned, true in (
        ("drift", reading.drift, pull),
        ("diffusion", reading.diffusion, restlessness),
    ):
        pairs = (f"{learned[0, k, 0]:.2f} ({true(line[k]).item():.2f})" for k in (25, 50, 75))
        print(f"{name} at -1, 0 and 1, and in truth: {', '.join(pairs)}")
    return replace(reading, states=prediction.states.flatten(1, 2), shape=(111,))


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    readings, steps, draws = (18, 2, 20) if smoke else (32, 120, 200)
    data, _ = simulate(6 if smoke else 200, readings, holes=False)
    others, states = simulate(12 if smoke else 300, readings, holes=True)
    started = time.perf_counter()
    fits = {
        "learned": trained(sd.ElementwiseField(1, 32, scale=4.0), data, steps),
        "one size": trained(Constant(), data, steps),
        "true": informed(),
    }
    print(f"Two fits in {time.perf_counter() - started:.0f} s")
    print("How often the 90 % interval holds the truth, and its width:")
    predictions = {name: coverage(name, fit, others, states, draws) for name, fit in fits.items()}

    fit, prediction = fits["learned"], predictions["learned"]
    print(f"measurement error {fit.model.decoder.log_scale.exp().item():.3f}, in truth {ERROR}")
    reading = read(fit, others, prediction)
    _, axes = plt.subplots(3, 1, figsize=(7, 8.5), layout="constrained")
    sd.plot_forecast(prediction, states=True, truth=states, time_label="hours", axes=axes[:1])
    seen = others.mask[0, :, 0]
    axes[0].plot(others.times[0, seen], others.values[0, seen, 0], "o", ms=4, color="black")
    axes[0].set_ylabel("signal")
    sd.plot_field(reading, drift=pull, diffusion=restlessness, names=["signal"], axes=axes[1:])
    out.mkdir(parents=True, exist_ok=True)
    axes[0].figure.savefig(out / "latent_sde.png", dpi=150)
    print(f"Wrote {out / 'latent_sde.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A latent SDE whose noise depends on the state.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
