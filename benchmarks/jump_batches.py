"""Sequences of different lengths in one batch: against one after the other, and against steps through all their times.

    python benchmarks/jump_batches.py              # 256 sequences, medians of 3 (minutes)
    python benchmarks/jump_batches.py --quick      # 32 sequences
    python benchmarks/jump_batches.py --json out.json

Forward and backward, one thread, all ways in turn, medians. Four problems: a jump ODE whose flow is a network and is
solved (the neural jump SDE of Jia & Benson), the same with closed flows, the Hawkes process, and a bouncing ball whose
bounces are found, each with its own restitution and times. The peers:

- `loop`: the same code, one sequence after the other.
- `union`: a plain implementation that steps all sequences through the sorted union of their times, and masks what is
  another's.

`64_to_1` is what a batch of 64 costs against the costliest of its members alone, `plain_64_to_1` the same of the
solver's steps without jumps: what the tensors alone cost.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import stochdyn as sd

Way = Callable[[], Iterable[Tensor]]  # each of the scores goes backward by itself
WINDOWS = 20.0, 60.0  # from the shortest to the longest


@dataclass(frozen=True)
class Watch:
    """Times ways in turn: medians of so many rounds, by a clock."""

    clock: Callable[[], float]
    rounds: int

    def once(self, way: Way, parameters: Sequence[Tensor]) -> float:
        """One run, forward and backward."""
        started = self.clock()
        for score in way():
            torch.autograd.grad(score, parameters, allow_unused=True)
        return self.clock() - started

    def medians(self, ways: dict[str, Way], parameters: Sequence[Tensor], times: int = 1) -> dict[str, float]:
        """Of `times` as many rounds."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.rounds * times):
            for name, way in ways.items():
                found[name].append(self.once(way, parameters))
        return {name: float(np.median(each)) for name, each in found.items()}


# Point processes: sequences of a Hawkes process in windows of different lengths.


def sequences(count: int, dtype: torch.dtype) -> sd.Jumps:
    """Windows of 20 to 60, about one jump per unit of time."""
    ends = torch.linspace(*WINDOWS, count, dtype=torch.float64)[torch.randperm(count)]
    drawn = sd.Hawkes(0.5, 0.8, 1.6, torch.zeros(count), ends).sample()
    return sd.Jumps(drawn, 0.0, ends).to(dtype)


def alone(jumps: sd.Jumps, k: int) -> sd.Jumps:
    """One of them, without the padding of the others."""
    values = jumps.values[k : k + 1, : int(jumps.counts[k])]
    return sd.Jumps(values, 0.0, float(jumps.t1[k]), dtype=values.dtype)


class Hawkes(nn.Module):
    """The closed form, and its union loop."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.5, 0.8, 1.6], dtype=torch.float64).log())

    def score(self, jumps: sd.Jumps) -> Tensor:
        mu, alpha, beta = self.logs.exp()
        return sd.Hawkes(mu, alpha, beta, jumps.t0, jumps.t1).log_prob(jumps.values).sum()

    def union(self, jumps: sd.Jumps) -> Tensor:
        mu, alpha, beta = self.logs.exp()
        level = total = torch.zeros(len(jumps), dtype=torch.float64)
        now = torch.zeros((), dtype=torch.float64)
        for t, hit in union(jumps):
            gap = (torch.minimum(t, jumps.t1) - torch.minimum(now, jumps.t1)).clamp_min(0)
            decay = torch.exp(-beta * gap)
            total = total - mu * gap - alpha * level * (1 - decay) / beta
            level = level * decay
            total = total + torch.where(hit, torch.log(mu + alpha * level), 0.0)
            level, now = level + hit, t
        return total.sum()


class Neural(nn.Module):
    """A jump ODE, with a flow that is solved or closed, and its union loop."""

    def __init__(self, solved: bool) -> None:
        super().__init__()
        self.solved = solved
        parts = {"flow": sd.NeuralField(3, hidden=(32,)), "jump_map": sd.NeuralJump(3)} if solved else {}
        self.process = sd.NeuralJumpODE(3, (32,), rate=1.0, **parts)

    def score(self, jumps: sd.Jumps) -> Tensor:
        return self.process(jumps).log_prob(jumps.values).sum()

    def union(self, jumps: sd.Jumps) -> Tensor:
        # The trapezoid rule: pieces are as short as the gaps of all sequences together.
        process = self.process(jumps)
        z = process.initial.expand(len(jumps), -1)
        total, now = z.new_zeros(len(jumps)), torch.zeros((), dtype=torch.float64)
        rate = process.field(now.to(z)[None], z)[..., 0]
        for t, hit in union(jumps):
            h = (t - now).to(z)
            z = self.advance(process, now.to(z)[None], h, z)
            after = process.field(t.to(z)[None], z)[..., 0]
            total = total - torch.where(t <= jumps.t1, 0.5 * h * (rate + after), 0.0)
            total = total + torch.where(hit, after.log(), 0.0)
            if bool(hit.any()):
                moved = process.jump_map(t.to(z)[None], z, z.new_zeros(len(jumps), 0))
                z = torch.where(hit[:, None], moved, z)
            rate, now = process.field(t.to(z)[None], z)[..., 0], t
        return total.sum()

    def plain(self, jumps: sd.Jumps) -> Tensor:
        """As many steps of the solver, without jumps and intensity."""
        z = self.process.initial.expand(len(jumps), -1)
        ts = torch.linspace(0, 1, 100 + int(jumps.counts.max()), dtype=torch.float64) * jumps.t1[:, None]
        return sd.odeint(self.process.flow, z, ts, solver=sd.RungeKutta4()).square().sum()

    def advance(self, process: sd.JumpODE, t: Tensor, h: Tensor, z: Tensor) -> Tensor:
        if self.solved:
            return process.solver.mean(lambda s, y: process.flow(s, y), t, h, z)
        decay, shift = process.flow.over(t, h[None])
        return decay * z + shift


def union(jumps: sd.Jumps) -> list[tuple[Tensor, Tensor]]:
    """All times at which a sequence jumps or ends, in order, and who jumps."""
    times = torch.cat([jumps.times[jumps.mask].double(), jumps.t1]).unique()
    own = jumps.times.double()
    return [(t, (own == t).any(1)) for t in times]


# A bouncing ball: each has its own restitution, start and times.


@dataclass(frozen=True)
class Balls:
    """Start, restitution and times of every ball."""

    height: Tensor
    restitution: Tensor
    ts: Tensor

    @classmethod
    def drawn(cls, count: int) -> "Balls":
        gaps = 0.5 + torch.rand(count, 30, dtype=torch.float64)
        ends = torch.linspace(2.0, 6.0, count, dtype=torch.float64)[torch.randperm(count), None]
        ts = torch.nn.functional.pad(gaps.cumsum(1) / gaps.sum(1, keepdim=True), (1, 0)) * ends
        uniform = torch.rand(2, count, dtype=torch.float64)
        return cls(3 + 2 * uniform[0], 0.8 + 0.1 * uniform[1], ts)

    def __len__(self) -> int:
        return len(self.ts)

    def of(self, where: slice) -> "Balls":
        return Balls(self.height[where], self.restitution[where], self.ts[where])


class Ball(nn.Module):
    """Gravity and air drag are learned; `union` is a plain loop of fixed steps with bounces inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([9.81, 0.05], dtype=torch.float64).log())

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        gravity, drag = self.logs.exp()
        return torch.stack([z[..., 1], -gravity - drag * z[..., 1]], -1)

    def start(self, balls: Balls) -> Tensor:
        return torch.stack([balls.height, torch.zeros_like(balls.height)], -1)

    def path(self, balls: Balls, bounce: bool = True) -> Tensor:
        def back(t: Tensor, z: Tensor) -> Tensor:
            return torch.stack([z[..., 0], -balls.restitution * z[..., 1]], -1)

        floor = sd.Trigger(lambda t, z: z[..., 0], back, direction=-1)
        return sd.odeint(self.field, self.start(balls), balls.ts, jumps=[floor] if bounce else [])

    def score(self, balls: Balls) -> Tensor:
        return self.path(balls).square().mean((1, 2)).sum()

    def plain(self, balls: Balls) -> Tensor:
        return self.path(balls, bounce=False).square().mean((1, 2)).sum()

    def union(self, balls: Balls) -> Tensor:
        z, now, total = self.start(balls), balls.ts[0, 0], torch.zeros((), dtype=torch.float64)
        method = sd.RungeKutta4()
        for t in balls.ts.unique():
            h = (t - now).expand(len(balls))[:, None]
            end = method.mean(self.field, now, h, z)
            fell = (end[:, 0] < 0) & (z[:, 1] < 0)
            if bool(fell.any()):
                end = self.bounced(balls, z, h, end, fell)
            mine = (balls.ts == t).any(1)[:, None]
            total = total + torch.where(mine, end.square(), 0.0).sum()
            z, now = end, t
        return total / (2 * balls.ts.shape[1])

    def bounced(self, balls: Balls, z: Tensor, h: Tensor, end: Tensor, fell: Tensor) -> Tensor:
        """Up to the floor, back, and on to the end of the step."""
        share = z[:, :1] / torch.where(fell[:, None], z[:, :1] - end[:, :1], 1.0)
        until = torch.where(fell[:, None], share, 0.0) * h
        method, t = sd.RungeKutta4(), torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            at = method.mean(self.field, t, until, z)
            until = until - torch.where(fell[:, None], at[:, :1] / at[:, 1:], 0.0)
        at = method.mean(self.field, t, until, z)
        back = torch.stack([torch.zeros_like(at[:, 0]), -balls.restitution * at[:, 1]], -1)
        return torch.where(fell[:, None], method.mean(self.field, t, h - until, back), end)


# The table.


def compare(name: str, model: nn.Module, data: sd.Jumps | Balls, watch: Watch) -> dict[str, float]:
    """A batch against its loop, its union, and 64 of it against the costliest alone."""
    parameters = list(model.parameters())
    one = alone if isinstance(data, sd.Jumps) else lambda balls, k: balls.of(slice(k, k + 1))
    singles = [one(data, k) for k in range(len(data))]
    ways: dict[str, Way] = {
        "loop": lambda: (model.score(each) for each in singles),
        "union": lambda: [model.union(data)],
    }
    with torch.no_grad():
        whole, *others = (
            sum(float(score) for score in way()) for way in (lambda: [model.score(data)], *ways.values())
        )
    np.testing.assert_allclose(others, whole, rtol=2e-2)  # of the union, another quadrature
    found = watch.medians(ways, parameters)
    few = data[: min(64, len(data))] if isinstance(data, sd.Jumps) else data.of(slice(64))
    costs = [
        min(watch.once(lambda each=each: [model.score(each)], parameters) for _ in range(watch.rounds))
        for each in singles[: len(few)]
    ]
    worst = singles[int(np.argmax(costs))]
    small: dict[str, Way] = {
        "batch": lambda: [model.score(data)],
        "64": lambda: [model.score(few)],
        "1": lambda: [model.score(worst)],
    }
    if name in ("solved", "triggered"):
        small |= {"plain 64": lambda: [model.plain(few)], "plain 1": lambda: [model.plain(worst)]}
    found |= watch.medians(small, parameters, 5)
    print(row(name, found))
    figures = {
        f"{name}_loop_ratio": found["loop"] / found["batch"],
        f"{name}_union_ratio": found["union"] / found["batch"],
        f"{name}_64_to_1": found["64"] / found["1"],
        f"{name}_64_seconds": found["64"],
    }
    if "plain 64" in found:
        figures[f"{name}_plain_64_to_1"] = found["plain 64"] / found["plain 1"]
    return figures


def row(name: str, found: dict[str, float]) -> str:
    ratios = found["loop"] / found["batch"], found["union"] / found["batch"], found["64"] / found["1"]
    times = "".join(f"{1000 * found[key]:10.1f}" for key in ("batch", "loop", "union", "64", "1"))
    return f"{name:10s}{times}{ratios[0]:8.1f}{ratios[1]:8.1f}{ratios[2]:9.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="32 sequences, one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--count", type=int, help="sequences in the batch")
    parser.add_argument("--rounds", type=int, help="runs of every way")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="of the networks")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a busy machine")
    chosen = parser.parse_args(arguments)
    count, rounds = chosen.count or (32 if chosen.quick else 256), chosen.rounds or (1 if chosen.quick else 3)
    watch = Watch(time.process_time if chosen.cpu_time else time.perf_counter, rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, chosen.dtype)
    jumps, balls = sequences(count, torch.float64), Balls.drawn(count)
    few = min(64, count)
    print(
        f"{count} sequences, milliseconds, medians of {rounds} (batches: {5 * rounds}); ratios: peer / batch, {few} / 1"
    )
    heads = ("batch", "loop", "union", str(few), "1")
    print(" " * 10 + "".join(f"{head:>10s}" for head in heads) + f"{'loop':>8s}{'union':>8s}{few:>7d}/1")
    found = compare("solved", Neural(True).to(dtype), jumps.to(dtype), watch)
    found |= compare("closed", Neural(False).to(dtype), jumps.to(dtype), watch)
    found |= compare("hawkes", Hawkes(), jumps, watch)
    found |= compare("triggered", Ball(), balls, watch)
    found["closed_64_to_solved_64"] = found["closed_64_seconds"] / found["solved_64_seconds"]
    print(f"closed against solved, 64 sequences: {found['closed_64_to_solved_64']:.3f} of the time")
    for name in ("solved", "triggered"):
        print(f"{name}, the same steps without jumps, {few} / 1: {found[f'{name}_plain_64_to_1']:.2f}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
