"""Conditional expectations of processes observed now and then: how near a model comes to the best possible loss.

    python benchmarks/observation_jumps.py --process ou --threads 1 --json out.json   # black_scholes, ou, heston
    python benchmarks/observation_jumps.py --process heston --raw                      # values, not their logarithms
    python benchmarks/observation_jumps.py --quick                                     # fewer paths, under a minute

The problems of Herrera, Krach & Teichmann (2021): 20,000 paths of 100 steps on [0, 1] from 1, each later time
observed with probability .1, 80 % to train on. Drift 2 and volatility .3 (Black-Scholes); mean 4, speed 2 and
volatility .3 (Ornstein-Uhlenbeck); drift 2, variance from 4 with mean 4, speed 2, volatility .3 and correlation .5
(Heston). The steps are such that the closed forms of the conditional expectation are exact.

`loss` is theirs on the held-out paths: the mean over a path's observations of (|x - y| + |y - y_before|)^2, with y and
y_before the conditional mean of the model after and before the observation, then the mean over paths. `optimal` is the
same of the true conditional expectation on the same data, `ratio` the one by the other; in print 1.05
(Black-Scholes), 1.22 (Ornstein-Uhlenbeck), .98 (Heston). Heston paths have heavy tails, and a few of them make up the
loss: the optimum can be beaten there by luck. `distance`, the mean squared distance to the true conditional expectation
on the grid, and `relative_distance`, the root mean square of their ratio less 1, say more. The model is trained by its
exact likelihood, not by that loss, and positive processes as logarithms.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import stochdyn as sd

STEPS, SHARE = 100, 0.1
DRIFT, VOLATILITY, MEAN, SPEED, CORRELATION = 2.0, 0.3, 4.0, 2.0, 0.5


def black_scholes(paths: int) -> Tensor:
    dt = 1 / STEPS
    moves = (DRIFT - VOLATILITY**2 / 2) * dt + VOLATILITY * math.sqrt(dt) * torch.randn(paths, STEPS).double()
    return torch.nn.functional.pad(moves.cumsum(1), (1, 0)).exp()


def ou(paths: int) -> Tensor:
    decay = math.exp(-SPEED / STEPS)
    sd_ = VOLATILITY * math.sqrt((1 - decay**2) / (2 * SPEED))
    x = [torch.ones(paths).double()]
    for noise in torch.randn(STEPS, paths).double():
        x.append(MEAN + (x[-1] - MEAN) * decay + sd_ * noise)
    return torch.stack(x, 1)


def heston(paths: int) -> Tensor:
    """Given the variance at its start a step of the logarithm is normal, so that E[S] = S0 exp(drift t) exactly."""
    dt = 1 / STEPS
    log_price, v = [torch.zeros(paths).double()], torch.full((paths,), MEAN).double()
    for one, two in zip(*torch.randn(2, STEPS, paths).double(), strict=True):
        log_price.append(log_price[-1] + (DRIFT - v / 2) * dt + (v * dt).sqrt() * one)
        shock = CORRELATION * one + math.sqrt(1 - CORRELATION**2) * two
        v = (v + SPEED * (MEAN - v) * dt + VOLATILITY * (v * dt).sqrt() * shock).clamp_min(0)
    return torch.stack(log_price, 1).exp()


def grows(last: Tensor, elapsed: Tensor) -> Tensor:
    return last * (DRIFT * elapsed).exp()


def reverts(last: Tensor, elapsed: Tensor) -> Tensor:
    return MEAN + (last - MEAN) * (-SPEED * elapsed).exp()


@dataclass(frozen=True)
class Process:
    """How paths are made, the true conditional expectation, and whether values are positive."""

    simulate: Callable[[int], Tensor]
    expected: Callable[[Tensor, Tensor], Tensor]
    positive: bool


PROCESSES = {
    "black_scholes": Process(black_scholes, grows, True),
    "ou": Process(ou, reverts, False),
    "heston": Process(heston, grows, True),
}


@dataclass(frozen=True)
class Size:
    """How much there is to train on, and for how long."""

    paths: int
    steps: int
    batch: int
    lr: float


FULL, QUICK = Size(20_000, 1200, 400, 4e-3), Size(1000, 150, 100, 1e-2)


def observed(paths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The observed times and values of every path."""
    seen = torch.rand(paths.shape) < SHARE
    seen[:, 0] = True
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    return [(times[s], path[s, None]) for path, s in zip(paths, seen, strict=True)]


class Means:
    """The conditional means of a model, on the scale of the process."""

    def __init__(self, model: sd.ObservationJumpODE, batch: sd.Series, logarithm: bool) -> None:
        self.model, self.batch, self.logarithm = model, batch, logarithm

    def of(self, seen: object) -> Tensor:
        mean, variance = seen.mean[..., 0].double(), seen.variance[..., 0].double()
        return (mean + variance / 2).exp() if self.logarithm else mean

    def before(self) -> Tensor:
        return self.of(self.model.one_step_ahead(self.batch))

    def until(self, ts: Tensor | None = None) -> Tensor:
        return self.of(self.model.predictive(self.batch, ts))


def loss(x: Tensor, mask: Tensor, y: Tensor, before: Tensor) -> float:
    """Means over the observations after the first of each path, then over all paths."""
    counted = mask.clone()
    counted[:, 0] = False
    terms = ((x - y).abs() + (y - before).abs()).square() * counted
    return float((terms.sum(1) / counted.sum(1).clamp_min(1)).mean())


def last_known(batch: sd.Series, x: Tensor, ts: Tensor) -> tuple[Tensor, Tensor]:
    """(series, k) the value last observed until times ts (series, k), and the time since."""
    row = torch.searchsorted(batch.times.contiguous(), ts.contiguous(), right=True) - 1
    row = torch.minimum(row, batch.lengths[:, None] - 1)
    return x.gather(1, row), ts - batch.times.gather(1, row)


def evaluated(process: Process, means: Means, x: Tensor, batch: sd.Series) -> dict[str, float]:
    """The figures on held-out paths, x (series, time) being the values in double precision."""
    mask = batch.mask[..., 0]
    earlier, gap = x[:, :-1], batch.times.diff(dim=1)
    first = x[:, :1]
    best = torch.cat([first, process.expected(earlier, gap)], 1)
    grid = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64).expand(len(x), -1)
    truth, found = process.expected(*last_known(batch, x, grid)), means.until(grid)
    figures = {
        "loss": loss(x, mask, means.until(), means.before()),
        "optimal": loss(x, mask, x, best),
        "distance": float((found - truth).square().mean()),
        "relative_distance": float((found / truth - 1).square().mean().sqrt()),
        "last_value_ratio": loss(x, mask, x, torch.cat([first, earlier], 1)),
    }
    figures["ratio"] = figures["loss"] / figures["optimal"]
    figures["last_value_ratio"] /= figures["optimal"]
    figures["distance_ratio"] = figures["distance"] / float(truth.var())
    return figures


def run(process: Process, size: Size, logarithm: bool, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    rows = observed(process.simulate(size.paths))
    held = len(rows) // 5
    scaled = [(t, y.log() if logarithm else y) for t, y in rows]
    train, test = (sd.Series.from_list(part, dtype=torch.float32) for part in (scaled[held:], scaled[:held]))
    x = sd.Series.from_list(rows[:held], dtype=torch.float64).values[..., 0]
    model = sd.ObservationJumpODE(1, 32, anchored=True, given_first=True, solver=sd.Heun(2))
    began, cpu = time.perf_counter(), time.process_time()
    options = {"steps": size.steps, "batch_size": size.batch, "lr": sd.Decay(size.lr, size.steps)}
    sd.fit(model, model.guide, train, progress=False, seed=seed, **options)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    with torch.no_grad():
        found = evaluated(process, Means(model.eval(), test, logarithm), x, test)
    return found | spent


def show(name: str, found: dict[str, float]) -> None:
    print(f"{name}: loss {found['loss']:.5f}, optimal {found['optimal']:.5f}, ratio {found['ratio']:.4f}")
    print(f"  the last value instead: ratio {found['last_value_ratio']:.2f}")
    print(
        f"  mean squared distance to the true conditional expectation {found['distance']:.3g} "
        f"({100 * found['distance_ratio']:.3g} % of its variance)"
    )
    print(f"  root mean squared relative distance to it {100 * found['relative_distance']:.2g} %")
    print(
        f"  {found['seconds']:.0f} s of training, {found['cpu_seconds']:.0f} s of them on the CPU", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--process", choices=sorted(PROCESSES), default="black_scholes")
    parser.add_argument(
        "--raw", action="store_true", help="positive processes as they are, not as logarithms"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="of training")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    process, size = PROCESSES[args.process], QUICK if args.quick else FULL
    size = size if args.steps is None else replace(size, steps=args.steps)
    found = run(process, size, process.positive and not args.raw, args.seed)
    show(args.process, found)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
