"""Intensive care, PhysioNet 2012: latent SDEs that interpolate vital signs and laboratory values of single stays.

    export STOCHDYN_DATA=FOLDER                  # holds physionet2012_train.npz
    python benchmarks/physionet.py               # six minutes of one core
    python benchmarks/physionet.py --part val    # settings are chosen on this part
    python benchmarks/physionet.py --quick       # few stays and steps, under a minute

A random half of the measuring times of every stay is shown, the observations at the other times are predicted from it;
their mean square error over all of them, times 1000, is the figure. Channels are scaled from 0 to 1 by the extremes of
the training stays, and what lies beyond is set to 0 or 1.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyro.distributions as dist
import torch
from physionet_baselines import Process, errors, fitted, means, plain, smoothed
from physionet_data import Parts, Stays, read, split
from pyro import poutine
from torch import Tensor, nn

import stochdyn as sd

EXTRA = {"circulation": 2}  # states more than channels: what disturbs all channels of an instrument at once
FAST = 30.0  # the rate of these states, per day
FLOOR = 0.003  # of the noise, in scaled units: values are rounded
SYSTEMS = {
    "circulation": ("HR", "NIDiasABP", "NIMAP", "NISysABP", "DiasABP", "MAP", "SysABP", "Temp"),
    "breathing": ("GCS", "FiO2", "PaO2", "PaCO2", "pH", "SaO2", "RespRate", "HCO3"),
    "kidney": ("Urine", "Weight", "BUN", "Creatinine", "K", "Na", "Mg", "Glucose"),
    "blood": ("HCT", "Platelets", "WBC", "Lactate", "ALP", "ALT", "AST", "Bilirubin"),
    "rest": ("Albumin", "Cholesterol", "TroponinI", "TroponinT"),
}


@dataclass(frozen=True)
class Choice:
    """What was chosen on the validation part."""

    steps: int = 80
    batch: int = 64
    lr: float = 1e-2
    ode_steps: int = 300
    ode_lr: float = 5e-3
    most: int = 110  # times of a stay that are trained on
    stays: int | None = None


# The latent SDE: one per system of organs.


class Organ(nn.Module):
    """The process: decaying states, dz = -rate z dt + sqrt(2 rate) dW, and a start that statics move."""

    def __init__(self, rate: Tensor, statics: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(rate.log())
        self.start = nn.Linear(statics, len(rate))
        nn.init.zeros_(self.start.weight)
        nn.init.zeros_(self.start.bias)

    def decay(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return -self.log_rate.exp() * z

    def forward(self, ts: Tensor, context: Tensor) -> sd.SDEPath:
        rate = self.log_rate.exp()
        start = dist.Normal(self.start(context[:, 0]), 1.0).to_event(1)
        solver = sd.ExponentialEuler(-rate)  # exact, however long the gap
        return sd.SDEPath(self.decay, (2 * rate).sqrt(), start, ts, solver=solver, context=context)


class Instruments(sd.AbstractDecoder):
    """y = mean + scale (loadings z) + noise; the loadings begin near the identity: every channel its own state."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, noise: Tensor, extra: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.loadings = nn.Linear(len(mean) + extra, len(mean))
        self.log_noise = nn.Parameter((noise - FLOOR).clamp(min=FLOOR).log())
        with torch.no_grad():
            self.loadings.weight[:, : len(mean)] = torch.eye(len(mean))
            self.loadings.weight[:, len(mean) :].normal_(std=0.1)
            self.loadings.bias.zero_()

    def forward(self, z: Tensor) -> dist.Normal:
        return dist.Normal(self.mean + self.scale * self.loadings(z), FLOOR + self.log_noise.exp())


def latent_sde(processes: list[Process], statics: int, extra: int = 0) -> sd.LatentSDE:
    """The model of a system, begun at the Gaussian processes of its channels."""
    level, ou, noise = torch.stack([p.log_scales.detach().exp() for p in processes], -1).float()
    rate = torch.stack([p.log_rate.detach().exp() for p in processes]).float().clamp(0.1, 10)
    rate = torch.cat([rate, torch.full((extra,), FAST)])
    mean = torch.stack([p.mean.detach() for p in processes]).float()
    return sd.LatentSDE(
        len(processes),
        len(rate),
        substeps=1,
        covariates=statics,
        process=Organ(rate, statics),
        decoder=Instruments(mean, (level.square() + ou.square()).sqrt().clamp(0.005, 0.5), noise, extra),
        paths=sd.FilterMessage(refine=0, learned=False),  # linear and Gaussian: it is the posterior
    )


def of_channels(stays: Stays, chosen: list[int], most: int | None = None) -> tuple[Stays, Tensor, Tensor]:
    """Some channels, at the times at which one of them was measured; and which stays and times these are."""
    shown, held, y = stays.shown, stays.held[..., chosen], stays.truth[..., chosen]
    seen = shown.mask[..., chosen]
    measured = (seen | held).any(-1)
    who = measured.any(1).nonzero()[:, 0]
    order = measured[who].double().sort(dim=1, descending=True, stable=True).indices
    order = order[:, : min(int(measured.sum(1).max()), most or order.shape[1])]
    real = measured[who].gather(1, order)
    rows = order[..., None].expand(*order.shape, len(chosen))
    times = torch.where(real, shown.times[who].gather(1, order), 0.0).cummax(1).values
    y, held, seen = (x[who].gather(1, rows) for x in (y, held, seen))
    names = [shown.channels[c] for c in chosen]
    covariates = None if shown.covariates is None else shown.covariates[who]
    series = sd.Series(times, y, seen & real[..., None], channels=names, covariates=covariates)
    return Stays(series, held & real[..., None], y), who, order


@torch.no_grad()
def interpolated(fit: sd.Fit, stays: Stays, size: int = 100) -> Tensor:
    """(stay, time, channel) the decoded mean of the posterior: its path without noise."""
    out = []
    fit.guide.eval()
    for begin in range(0, len(stays), size):
        batch = stays.shown[begin : begin + size]
        path = poutine.trace(fit.guide).get_trace(batch).nodes["z"]["fn"]
        calm = torch.zeros(path.event_shape[0], *path.batch_shape, path.event_shape[1])
        out.append(fit.model.decoder(path.transport(calm)).mean)
    return torch.cat(out)


def by_latent_sde(parts: Parts, test: Stays, processes: list[Process], choice: Choice, seed: int) -> Tensor:
    """Predictions of all channels; those of none of the systems get their mean."""
    channels = list(test.shown.channels)
    out = means(parts.train).expand_as(test.truth).clone()
    for name, members in SYSTEMS.items():
        chosen = [channels.index(c) for c in members]
        train = of_channels(parts.train, chosen, choice.most)[0]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = latent_sde(
                [processes[c] for c in chosen], train.shown.covariates.shape[-1], EXTRA.get(name, 0)
            )
        started = time.perf_counter()
        fit = sd.fit(
            model,
            model.guide,
            train.everything,
            steps=choice.steps,
            batch_size=min(choice.batch, len(train)),
            lr=choice.lr,
            seed=seed,
            progress=False,
        )
        some, who, order = of_channels(test, chosen)
        found = interpolated(fit, some)
        rows = order[..., None].expand(*order.shape, len(chosen))
        part = out[who][..., chosen].scatter(1, rows, found)
        out[who[:, None], :, torch.tensor(chosen)] = part.movedim(-1, 1)
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return out


# The latent ODE: one for all channels.


class Thinned(sd.AbstractEncoder):
    """In training an encoder of a random half of the times, as in the test."""

    def __init__(self, encoder: sd.AbstractEncoder) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, encoder.hidden

    def forward(self, batch: sd.Series) -> Tensor:
        if not self.training:
            return self.encoder(batch)
        keep = torch.rand(batch.mask.shape[:2]) < 0.5
        mask = batch.mask & keep[..., None]
        return self.encoder(sd.Series(batch.times, batch.values, mask, covariates=batch.covariates))


def latent_ode(mean: Tensor, statics: int) -> sd.LatentODE:
    """An ODE-RNN encoder, 24 states, a decoder that begins at the means."""
    channels = len(mean)
    net = sd.MLP(24, channels, hidden=(96,), activation=torch.tanh)
    with torch.no_grad():
        net.layers[-1].bias.copy_(mean)
    return sd.LatentODE(
        channels,
        24,
        decoder=sd.NormalDecoder(net, channels, scale=0.1),
        encoder=Thinned(sd.ODERNNEncoder(channels, 96, solver=sd.Heun(), covariates=statics)),
        solver=sd.Heun(),
    )


def by_latent_ode(parts: Parts, test: Stays, choice: Choice, seed: int) -> Tensor:
    everything = of_channels(parts.train, list(range(parts.train.truth.shape[-1])), choice.most)[0].everything
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = latent_ode(means(parts.train), parts.train.shown.covariates.shape[-1])
    fit = sd.fit(
        model,
        model.guide,
        everything,
        steps=choice.ode_steps,
        batch_size=min(50, len(everything)),
        lr=choice.ode_lr,
        seed=seed,
        progress=False,
    )
    out = []
    for begin in range(0, len(test), 100):
        states = sd.predict(fit, test.shown[begin : begin + 100], draws=30).states
        with torch.no_grad():
            out.append(model.decoder(states).mean.mean(0))
    return torch.cat(out)


# Figures.


def measure(parts: Parts, test: Stays, choice: Choice, seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    predicted = {}
    started = time.perf_counter()
    processes = fitted(parts.train, choice.stays)
    predicted.update(plain(parts.train, test), gaussian_process=smoothed(processes, test))
    found["baseline_seconds"] = time.perf_counter() - started
    for name, by in (
        ("latent_ode", lambda: by_latent_ode(parts, test, choice, seed)),
        ("latent_sde", lambda: by_latent_sde(parts, test, processes, choice, seed)),
    ):
        started = time.perf_counter()
        predicted[name] = by()
        found[f"{name}_seconds"] = time.perf_counter() - started
    print(f"{'':18s}{'MSE x 1e3':>10s}{'error':>8s}{'published scale':>17s}")
    for name, values in predicted.items():
        square, count = errors(values, test)
        mse, published = square.sum() / count.sum(), (square * parts.published).sum() / count.sum()
        spread = standard_error(values, test)
        found[f"{name}_mse"], found[f"{name}_mse_published_scale"] = 1e3 * float(mse), 1e3 * float(published)
        found[f"{name}_error"] = 1e3 * spread
        print(f"{name:18s}{1e3 * mse:10.3f}{1e3 * spread:8.3f}{1e3 * published:17.3f}")
    found["test_mse"] = found["latent_sde_mse"]
    report(predicted, test)
    return found


def standard_error(values: Tensor, test: Stays, other: Tensor | None = None) -> float:
    """Of the mean square error, over stays; with `other` of the difference between two predictions."""
    square = ((values - test.truth).square() * test.held).sum((1, 2)).double()
    if other is not None:
        square = square - ((other - test.truth).square() * test.held).sum((1, 2)).double()
    count = test.held.sum((1, 2)).double()
    ratio = square.sum() / count.sum()
    return float((square - ratio * count).square().sum().sqrt() / count.sum())


def report(predicted: dict[str, Tensor], test: Stays) -> None:
    """Per channel, those that weigh most first: the share of the error, and the errors."""
    names = ("mean", "straight", "gaussian_process", "latent_ode", "latent_sde")
    sums = {name: errors(predicted[name], test)[0] for name in names}
    count = test.held.sum((0, 1)).double()
    print(f"\n{'MSE x 1e3':14s}{'number':>8s}" + "".join(f"{name:>18s}" for name in names))
    for c in sums["latent_sde"].argsort(descending=True).tolist():
        if count[c] > 0:
            row = "".join(f"{1e3 * float(sums[name][c] / count[c]):18.3f}" for name in names)
            print(f"{test.shown.channels[c]:14s}{int(count[c]):8d}{row}")
    sde, gp = predicted["latent_sde"], predicted["gaussian_process"]
    less = float((sums["latent_sde"] - sums["gaussian_process"]).sum() / count.sum())
    error = standard_error(sde, test, gp)
    print(f"\nlatent SDE less Gaussian process, paired: {1e3 * less:.3f} +- {1e3 * error:.3f}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("test", "val"), default="test", help="what to predict")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and batches; the split is always the same"
    )
    parser.add_argument("--threads", type=int, default=1, help="two on a busy machine are far slower")
    parser.add_argument("--quick", action="store_true", help="few stays and steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    folder = os.environ.get("STOCHDYN_DATA")
    if not folder:
        print(
            "STOCHDYN_DATA is not set: it names the folder of physionet2012_train.npz. Nothing was measured."
        )
        return
    torch.set_num_threads(chosen.threads)
    parts, choice = split(read(Path(folder) / "physionet2012_train.npz")), Choice()
    test = parts.val if chosen.part == "val" else parts.test
    if chosen.quick:
        choice = replace(choice, steps=4, ode_steps=8, batch=32, stays=50)
        parts, test = replace(parts, train=parts.train.first(200)), test.first(60)
    print(f"{len(parts.train)} stays to train on, {len(test)} of part {chosen.part} to predict")
    found = measure(parts, test, choice, chosen.seed)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
