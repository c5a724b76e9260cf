"""Walking, CMU MoCap-35: a latent SDE that continues a walk from its first frames, against a ridge autoregression.

    export STOCHDYN_DATA=FOLDER                                      # holds mocap35_train_val.npz
    python benchmarks/mocap35.py --setup 1 --test FILE               # npz with key `test`, (walk, 300, 50)
    python benchmarks/mocap35.py --setup 2 --test FILE --json out.json
    python benchmarks/mocap35.py --setup 1 --select                  # cross-validation on the 16 training walks
    python benchmarks/mocap35.py --quick                             # fewer steps and draws, under a minute

Setup 1: train on 300 frames, see 3, predict 297. Setup 2: train on the frames 0 to 199, see 100, predict 200. The error
is the mean square over frames and all 50 channels, then over walks; without --test that of the 3 validation walks, to
which no setting was fitted, though they were looked at while the model was designed. Settings are compared by
`--select`: folds of whole training walks, the baseline in the same folds, and template, scaling and components from the
training folds alone.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from mocap_gait import Reader, Template, harmonics, resampled
from torch import Tensor, nn

import stochdyn as sd

FRAME = 0.1  # units of time per frame
GRID = tuple(itertools.product((1, 2, 3), (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)))  # lags, ridge weight
FOLDS = tuple(tuple(range(k, 16, 4)) for k in range(4))


@dataclass(frozen=True)
class Setup:
    """Frames for training, frames given, frames to predict; `stride` of the given frames that are compared."""

    train: int
    given: int
    ahead: int
    stride: int


SETUPS = {1: Setup(300, 3, 297, 2), 2: Setup(200, 100, 200, 9)}


@dataclass(frozen=True)
class Choice:
    """What cross-validation chooses."""

    harmonics: int = 7
    deviations: int = 4
    modulation: int = 1
    warped: float = 0.0
    tuned: bool = True  # whether the template's weights are trained on
    steps: int = 200
    windows: int = 24
    lr: float = 1e-2
    every: int = 10
    batch: int = 16


CHOSEN = {1: Choice(), 2: Choice(warped=0.3)}


# The model.


class Drift(nn.Module):
    """Of (phase deviation, log speed, deviations): the phase runs ahead as the speed says, deviations decay and mix."""

    def __init__(self, rate: float, decay: Tensor, hidden: int = 16) -> None:
        super().__init__()
        self.rate, self.log_decay = rate, nn.Parameter(decay.log())
        self.net = sd.MLP(len(decay), len(decay), hidden=(hidden,), activation=torch.tanh)
        with torch.no_grad():
            self.net.layers[-1].weight.mul_(0.01)
            self.net.layers[-1].bias.zero_()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        speed, u = z[..., 1:2], z[..., 2:]
        phase = self.rate * torch.expm1(speed)
        return torch.cat([phase, torch.zeros_like(speed), self.net(u) - self.log_decay.exp() * u], -1)


class Posture(nn.Module):
    """Phase and deviations to channels: the template, and loadings of the deviations that change with the phase."""

    def __init__(self, weights: Tensor, axes: Tensor, modulation: int, tuned: bool) -> None:
        super().__init__()
        self.count, self.modulation = (len(weights) - 1) // 2, modulation
        self.weights = nn.Parameter(weights.clone(), requires_grad=tuned)
        loadings = axes.new_zeros(2 * modulation + 1, *axes.shape)
        loadings[0] = axes
        self.loadings = nn.Parameter(loadings)

    def forward(self, phase: Tensor, u: Tensor) -> Tensor:
        features = harmonics(phase, self.modulation)
        loadings = torch.tensordot(features, self.loadings, 1)
        return harmonics(phase, self.count) @ self.weights + (u[..., None] * loadings).sum(-2)


class Start(nn.Module):
    """The law of the state at the last given frame, given what `Reader` reads off the given frames."""

    def __init__(self, size: int, speed: float) -> None:
        super().__init__()
        self.speed = sd.MLP(1, 2, hidden=(8,), activation=torch.tanh)
        self.keep = nn.Parameter(torch.tensor([[0.8], [0.1]]).expand(2, size).clone())
        self.log_scale = nn.Parameter(torch.tensor([0.1, *[0.3] * size]).log())
        with torch.no_grad():
            self.speed.layers[-1].weight.mul_(0.01)
            self.speed.layers[-1].bias.copy_(torch.tensor([0.0, math.log(speed)]))

    def forward(self, read: Tensor) -> dist.TorchDistribution:
        speed, deviation = read[..., 1:2], read[..., 3:].unflatten(-1, (2, -1))
        loc, log_scale = self.speed(10 * speed).unbind(-1)
        u = (self.keep * deviation).sum(-2)
        loc = torch.cat([torch.zeros_like(speed), loc[..., None], u], -1)
        rest = self.log_scale.expand(loc.shape[:-1] + self.log_scale.shape)
        log_scale = torch.cat([rest[..., :1], log_scale[..., None], rest[..., 1:]], -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class Gait(nn.Module):
    """A walk after its given frames: phase = read phase + rate t + z0, dz = f(z) dt + g dW, y ~ Normal(posture)."""

    def __init__(self, template: Template, axes: Tensor, noise: Tensor, choice: Choice) -> None:
        super().__init__()
        size = len(axes)
        self.rate = template.rate / FRAME
        self.drift = Drift(self.rate, torch.full((size,), 0.5))
        self.log_diffusion = nn.Parameter(torch.tensor([0.03, 0.005, *[1.0] * size]).log())
        self.start = Start(size, float(template.speeds.std()))
        self.posture = Posture(template.weights.float(), axes, choice.modulation, choice.tuned)
        self.log_noise = nn.Parameter(noise.log())

    def path(self, batch: sd.Series) -> sd.SDEPath:
        ts, start = sd.TimeGrid(batch.times, substeps=1).ts, self.start(batch.covariates)
        return sd.SDEPath(
            self.drift, self.log_diffusion.exp(), start, ts, solver=sd.GaussianStep(mean=sd.Heun())
        )

    def mean(self, z: Tensor, batch: sd.Series) -> Tensor:
        """States (..., series, time, state) to channels."""
        phase = batch.covariates[:, None, 0] + self.rate * batch.times.to(z) + z[..., 0]
        return self.posture(phase, z[..., 2:])

    def forward(self, batch: sd.Series) -> Tensor:
        grid = sd.TimeGrid(batch.times, substeps=1)
        with batch.plate("series"):
            z = pyro.sample("z", self.path(batch))
            seen = dist.Normal(self.mean(grid.observed(z), batch), self.log_noise.exp())
            pyro.sample("y", seen.mask(batch.mask).to_event(2), obs=batch.values)
        return z


class Residuals(sd.AbstractEncoder):
    """A GRU over what a walk has beside the template at its read phase: phase errors and deviations."""

    def __init__(self, gait: Gait, hidden: int = 24) -> None:
        super().__init__()
        self.hidden, self.count, self.rate = hidden, gait.posture.count, gait.rate
        self.register_buffer("weights", gait.posture.weights.detach().clone())
        self.register_buffer("axes", gait.posture.loadings[0].detach().clone())
        self.gru = sd.GRUEncoder(1 + len(self.axes), hidden)

    def forward(self, batch: sd.Series) -> Tensor:
        phase = batch.covariates[:, None, 0] + self.rate * batch.times.to(batch.values)
        off = batch.values - harmonics(phase, self.count) @ self.weights
        order = torch.arange(1, self.count + 1).to(phase)
        features = harmonics(phase, self.count)
        cosines, sines = features[..., 1 : self.count + 1], features[..., self.count + 1 :]
        slope = (
            torch.cat([torch.zeros_like(features[..., :1]), -order * sines, order * cosines], -1)
            @ self.weights
        )
        ahead = (off * slope).sum(-1, keepdim=True) / slope.square().sum(-1, keepdim=True)
        rest = (off - ahead * slope) @ self.axes.mT / self.axes.square().sum(-1)
        found = torch.cat([10 * ahead, rest], -1)
        seen = batch.mask.any(-1, keepdim=True).expand(found.shape)
        return self.gru(sd.Series(batch.times, found, seen, dtype=found.dtype))


# Training and prediction.


class Walker:
    """The model with what it needs around it: live channels, their scales, the template's reader.

    Args:
        walks: (walk, frame, channel) to train on, in degrees.
        setup: what is given, and what is to be predicted.
        choice: the settings.
        seed: of weights, windows and draws.
    """

    def __init__(self, walks: Tensor, setup: Setup, choice: Choice, seed: int) -> None:
        walks = walks[:, : setup.train].double()
        self.setup, self.choice, self.seed = setup, choice, seed
        self.centre, scale = walks.mean((0, 1)), walks.flatten(0, 1).std(0)
        self.live = scale > 0.01
        self.scale = scale[self.live]
        scaled = walks[..., self.live] / self.scale
        template = Template.fitted(scaled, choice.harmonics)
        self.reader = Reader(template, setup.given, setup.stride)
        rest = template.residuals.flatten(0, 1)
        _, size, axes = torch.linalg.svd(rest, full_matrices=False)
        spread = (size / math.sqrt(len(rest)))[: choice.deviations, None]
        self.axes = (axes[: choice.deviations] * spread).float()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Gait(template, self.axes, rest.std(0).float() * 0.7, choice)
            paths = sd.Marginals()
            self.guide = sd.AmortizedGuide(self.model, Residuals(self.model), paths=paths, hidden=32)
            later = Reader(template, setup.train - setup.given, 9)(scaled[:, setup.given :])
            self.data, speeds = self.windows(scaled, later.speed)
            calibrate(self.model.start, self.data.covariates, speeds)
            self.model.start.speed.requires_grad_(False)
        self.guide(self.data)

    def read(self, scaled: Tensor) -> Tensor:
        """What the reader says of given frames, as covariates: phase, speed, spread, deviations (last and mean)."""
        found = self.reader(scaled)
        onto = self.axes.double() / self.axes.double().square().sum(-1, keepdim=True)
        numbers = torch.stack([found.phase, found.speed, found.spread], -1)
        return torch.cat([numbers, found.residual @ onto.mT, found.level @ onto.mT], -1).float()

    def windows(self, scaled: Tensor, speeds: Tensor) -> tuple[sd.Series, Tensor]:
        """Parts of the training walks, some at another speed, each with its first frames given; and the log speeds."""
        given, every = self.setup.given, self.choice.every
        length = (min(self.setup.ahead, self.setup.train - given) // every) + 1
        values, covariates, masks, truth = [], [], [], []
        for k in range(self.choice.windows):
            warp = bool(torch.rand(()) < self.choice.warped)
            factor = math.exp(float(torch.empty(()).uniform_(-0.2, 0.15))) if warp else 1.0
            walks = resampled(scaled, factor)
            truth.append(speeds + math.log(factor))
            last = walks.shape[1] - given - max(2 * every, (length - 1) * every // 5)
            begin = 0 if k == 0 else int(torch.randint(max(last, 1), ()))
            covariates.append(self.read(walks[:, begin:]))
            part = walks[:, begin + given - 1 :: every][:, :length].float()
            missing = length - part.shape[1]
            values.append(nn.functional.pad(part, (0, 0, 0, missing)))
            mask = torch.arange(length) < part.shape[1]
            masks.append(mask.expand(len(part), -1))
        y, mask = torch.cat(values), torch.cat(masks).clone()
        mask[:, 0] = False  # given, not to be explained
        times = torch.arange(length, dtype=torch.float64) * (every * FRAME)
        data = sd.Series(times, y, mask[..., None].expand(y.shape), covariates=torch.cat(covariates))
        return data, torch.cat(truth).float()

    def fit(self) -> sd.Fit:
        c = self.choice
        return sd.fit(
            self.model,
            self.guide,
            self.data,
            steps=c.steps,
            batch_size=c.batch,
            lr=c.lr,
            objective=sd.PathELBO(),
            seed=self.seed,
            progress=False,
        )

    @torch.no_grad()
    def draws(self, walks: Tensor, count: int = 200) -> Tensor:
        """(draw, walk, frame, channel) continuations of the given frames, without the noise of single frames."""
        covariates = self.read(walks[:, : self.setup.given].double()[..., self.live] / self.scale)
        times = torch.arange(self.setup.ahead + 1, dtype=torch.float64) * FRAME
        empty = torch.zeros(len(walks), len(times), int(self.live.sum()))
        batch = sd.Series(times, empty, torch.zeros_like(empty, dtype=torch.bool), covariates=covariates)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            z = pyro.infer.Predictive(self.model, num_samples=count, return_sites=["z"], parallel=True)(
                batch
            )["z"]
        out = self.centre.float().expand(*z.shape[:-2], self.setup.ahead, -1).clone()
        out[..., self.live] = self.model.mean(z, batch)[..., 1:, :] * self.scale.float()
        return out


def calibrate(start: Start, read: Tensor, speeds: Tensor, steps: int = 400) -> None:
    """Begin the law of the speed, given the speed read, at maximum likelihood over the windows."""
    adam = torch.optim.Adam(start.speed.parameters(), lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        loc, log_scale = start.speed(10 * read[:, 1:2]).unbind(-1)
        adam.zero_grad()
        (0.5 * ((speeds - loc) / log_scale.exp()).square() + log_scale).mean().backward()
        adam.step()
        decay.step()


# Baselines.


def ridge(walks: Tensor, lags: int, weight: float) -> Tensor:
    """Weights (lags * channel + 1, channel) of a vector autoregression with intercept, which is not penalised."""
    frames = walks.shape[1]
    past = [walks[:, lags - 1 - k : frames - 1 - k] for k in range(lags)]
    x = torch.cat([*past, torch.ones_like(walks[:, lags:, :1])], -1).flatten(0, 1)
    penalty = weight * torch.eye(x.shape[1]).to(x)
    penalty[-1, -1] = 0
    return torch.linalg.solve(x.mT @ x + penalty, x.mT @ walks[:, lags:].flatten(0, 1))


def rolled(weights: Tensor, given: Tensor, ahead: int) -> Tensor:
    """The frames that follow, each from those before it."""
    lags = (len(weights) - 1) // given.shape[-1]
    last = list(given[:, -lags:].unbind(1))
    for _ in range(ahead):
        past = torch.cat([*reversed(last[-lags:]), torch.ones_like(given[:, 0, :1])], -1)
        last.append(past @ weights)
    return torch.stack(last[lags:], 1)


def errors(predicted: Tensor, walks: Tensor, setup: Setup) -> Tensor:
    """(..., walk) mean square over the predicted frames and all channels."""
    target = walks[:, setup.given : setup.given + setup.ahead]
    return (predicted.double() - target.double()).square().mean((-1, -2))


def var_errors(train: Tensor, held: Tensor, setup: Setup, lags: int, weight: float) -> Tensor:
    weights = ridge(train[:, : setup.train].double(), lags, weight)
    return errors(rolled(weights, held[:, : setup.given].double(), setup.ahead), held, setup)


def var_chosen(walks: Tensor, setup: Setup) -> tuple[tuple[int, float], Tensor]:
    """Lags and weight by 4-fold cross-validation, and the errors of all walks in their folds."""
    found = {g: by_fold(walks, lambda train, held, g=g: var_errors(train, held, setup, *g)) for g in GRID}
    best = min(GRID, key=lambda g: float(found[g].mean()))
    return best, found[best]


def nearest(train: Tensor, held: Tensor, setup: Setup) -> Tensor:
    """The training walk with the nearest given frames goes on as it did; zero where its training frames end."""
    off = train[:, None, : setup.given] - held[None, :, : setup.given]
    found = train[off.square().mean((2, 3)).argmin(0), setup.given : setup.train]
    return nn.functional.pad(found, (0, 0, 0, setup.given + setup.ahead - setup.train))


def by_fold(walks: Tensor, score) -> Tensor:
    """(walk,) what `score(train, held)` says of every walk when its fold is held out."""
    out = torch.zeros(len(walks), dtype=torch.float64)
    for fold in FOLDS:
        held = [i for i in fold if i < len(walks)]
        train = [i for i in range(len(walks)) if i not in held]
        out[held] = score(walks[train], walks[held]).double()
    return out


# Runs.


@dataclass(frozen=True)
class Scores:
    """Errors of the mean prediction and mean errors of the draws: (seed, walk); `pooled` of all seeds' mean."""

    mean: Tensor
    samples: Tensor
    pooled: Tensor


def scores(train: Tensor, held: Tensor, setup: Setup, choice: Choice, run: "Run") -> Scores:
    means, samples, total = [], [], 0.0
    for seed in range(run.seeds):
        walker = Walker(train, setup, choice, seed)
        walker.fit()
        draws = walker.draws(held, run.draws)
        means.append(errors(draws.mean(0), held, setup))
        samples.append(errors(draws, held, setup).mean(0))
        total = total + draws.mean(0)
    return Scores(torch.stack(means), torch.stack(samples), errors(total / run.seeds, held, setup))


@dataclass(frozen=True)
class Run:
    """How much of it."""

    seeds: int = 3
    draws: int = 200


def row(name: str, found: Tensor) -> str:
    return f"{name:<26}{float(found.mean()):8.2f}   " + " ".join(f"{float(e):6.2f}" for e in found)


def select(walks: Tensor, setup: Setup, candidates: Sequence[Choice], run: Run) -> dict[str, float]:
    """Cross-validation on the training walks: a row per candidate, the baseline in the same folds."""
    grid, baseline = var_chosen(walks, setup)
    print(row(f"VAR{grid}", baseline), flush=True)
    out = {"var_mse": float(baseline.mean())}
    for k, choice in enumerate(candidates):
        samples = torch.zeros(run.seeds, len(walks), dtype=torch.float64)
        mean, start = samples.clone(), time.perf_counter()
        for fold in FOLDS:
            train = [i for i in range(len(walks)) if i not in fold]
            held = [i for i in fold if i < len(walks)]
            found = scores(walks[train], walks[held], setup, choice, run)
            mean[:, held], samples[:, held] = found.mean, found.samples
        print(choice, f"{time.perf_counter() - start:.0f} s", flush=True)
        for seed in range(run.seeds):
            print(row(f"  seed {seed}, mean of draws", mean[seed]))
        print(row("  draws", samples.mean(0)))
        better = mean.mean(0) < baseline
        print(f"  {int(better.sum())} of {len(walks)} walks better than VAR", flush=True)
        out[f"cv_mse_{k}"] = float(mean.mean())
    return out


def measure(train: Tensor, held: Tensor, setup: Setup, choice: Choice, run: Run) -> dict[str, object]:
    """Train on all training walks, predict those held."""
    grid, _ = var_chosen(train, setup)
    baseline = var_errors(train, held, setup, *grid)
    start = time.perf_counter()
    found = scores(train, held, setup, choice, run)
    seconds = time.perf_counter() - start
    print(f"{'':<26}{'MSE':>8}   per walk")
    print(row("zero", errors(torch.zeros(len(held), setup.ahead, held.shape[-1]), held, setup)))
    print(row("nearest training walk", errors(nearest(train, held, setup), held, setup)))
    print(row(f"VAR{grid}", baseline))
    for seed in range(run.seeds):
        print(row(f"seed {seed}, mean of draws", found.mean[seed]))
        print(row(f"seed {seed}, draws", found.samples[seed]))
    print(row("mean over seeds", found.mean.mean(0)))
    print(row("  less VAR, paired", found.mean.mean(0) - baseline))
    print(row("ensemble of the seeds", found.pooled))
    print(f"{seconds:.0f} s")
    return {
        "test_mse": float(found.mean.mean()),
        "test_mse_per_sequence": found.mean.mean(0).tolist(),
        "test_mse_per_seed": found.mean.mean(1).tolist(),
        "sample_mse": float(found.samples.mean()),
        "ensemble_mse": float(found.pooled.mean()),
        "var_mse": float(baseline.mean()),
        "var_mse_per_sequence": baseline.tolist(),
        "seconds": seconds,
    }


def candidates(setup: int) -> list[Choice]:
    """What was chosen, and one change each."""
    base = CHOSEN[setup]
    grid = {"warped": (0.0, 0.1, 0.3), "harmonics": (5, 7), "deviations": (4, 8), "tuned": (False, True)}
    changed = [replace(base, **{name: value}) for name, values in grid.items() for value in values]
    return [base, *(c for c in changed if c != base)]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", type=int, choices=sorted(SETUPS), default=1)
    parser.add_argument("--test", type=Path, help="npz with key `test`; without it the validation walks")
    parser.add_argument("--select", action="store_true", help="cross-validation on the training walks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def walks_of(path: Path, key: str) -> Tensor:
    with np.load(path) as held:
        return torch.from_numpy(held[key]).double()


def main() -> None:
    chosen = options()
    folder = os.environ.get("STOCHDYN_DATA")
    if not folder:
        print("STOCHDYN_DATA is not set: it names the folder of mocap35_train_val.npz. Nothing was measured.")
        return
    torch.set_num_threads(chosen.threads)
    setup, choice, run = SETUPS[chosen.setup], CHOSEN[chosen.setup], Run(seeds=chosen.seeds)
    if chosen.quick:
        choice, run = replace(choice, steps=choice.steps // 10, windows=8), Run(seeds=1, draws=50)
    train = walks_of(Path(folder) / "mocap35_train_val.npz", "train")
    if chosen.select:
        found: dict[str, object] = dict(select(train, setup, candidates(chosen.setup), replace(run, seeds=1)))
    else:
        source = (chosen.test, "test") if chosen.test else (Path(folder) / "mocap35_train_val.npz", "val")
        print(f"setup {chosen.setup}, {source[1]} walks")
        found = measure(train, walks_of(*source), setup, choice, run)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
