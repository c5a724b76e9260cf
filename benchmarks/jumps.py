"""Jumps: how well the intensity of a simulated point process is found, and the likelihood of earthquakes.

    export STOCHDYN_DATA=FOLDER                                          # holds events_*_train_val.npz
    python benchmarks/jumps.py --process exponential_hawkes --test FILE  # npz with keys test_times, test_offsets
    python benchmarks/jumps.py --process earthquake --json out.json      # test_marks too
    python benchmarks/jumps.py --quick                                   # fewer sequences, under a minute

The processes of Jia & Benson (2019), 300 sequences on [0, 100] to train on: the error is the mean over sequences and a
grid of .05 of |found - exact| / exact intensity, given the jumps before; in print 1.3 % (poisson), 5.9 %
(exponential_hawkes), 9.3 % (self_inhibiting) for neural jump SDEs. Without --test the validation part, on which the
size of the neural model was chosen (`jumps_neural.py`). Log-likelihoods are per jump. Earthquakes: 7 magnitudes as
marks, each sequence given its first jump, which is its time 0, up to its last one; the accuracy is that of the
likeliest mark at the time of the jump.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jumps_neural as neural
import numpy as np
import torch
from torch import Tensor

import stochdyn as sd

SPACING = 0.05
KINDS = 7
# `mape` and `log_likelihood` are those of this model.
MAIN = "neural"

Process = sd.PoissonProcess | sd.Hawkes | sd.SelfCorrecting | sd.MultivariateHawkes | sd.JumpODE
# From unconstrained numbers and windows to a process.
Make = Callable[[Tensor, Tensor, Tensor], Process]


@dataclass(frozen=True)
class Family:
    """A process whose parameters are found by maximum likelihood, from `start` in unconstrained space."""

    make: Make
    start: Tensor


@dataclass(frozen=True)
class Problem:
    """A data set: the exact process where it is known, and the families to fit."""

    exact: Make | None
    families: dict[str, Family]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def poisson(u: Tensor, t0: Tensor, t1: Tensor) -> sd.PoissonProcess:
    return sd.PoissonProcess(u[0].exp(), t0, t1)


def hawkes(u: Tensor, t0: Tensor, t1: Tensor) -> sd.Hawkes:
    beta = u[2].exp()
    return sd.Hawkes(u[0].exp(), u[1].sigmoid() * beta, beta, t0, t1)


def self_correcting(u: Tensor, t0: Tensor, t1: Tensor) -> sd.SelfCorrecting:
    return sd.SelfCorrecting(u[0].exp(), u[1].exp(), t0, t1)


def kinds(u: Tensor, t0: Tensor, t1: Tensor) -> sd.MultivariateHawkes:
    """Base rates, excitations (of logarithms), and a decay rate for each kind of cause."""
    mu, beta = u[:KINDS].exp(), u[KINDS : 2 * KINDS].exp()
    alpha = u[2 * KINDS :].reshape(KINDS, KINDS).exp()
    return sd.MultivariateHawkes(mu, alpha, beta[None], t0, t1, explosive=True)


def kinds_constant(u: Tensor, t0: Tensor, t1: Tensor) -> sd.MultivariateHawkes:
    return sd.MultivariateHawkes(u.exp(), u.new_zeros(KINDS, KINDS), 1.0, t0, t1)


CONSTANT = Family(poisson, numbers(0.0))
PROBLEMS = {
    "poisson": Problem(
        lambda u, t0, t1: sd.PoissonProcess(1.0, t0, t1), {"true_family": CONSTANT, "constant": CONSTANT}
    ),
    "exponential_hawkes": Problem(
        lambda u, t0, t1: sd.Hawkes(0.2, 0.8, 1.0, t0, t1),
        {"true_family": Family(hawkes, numbers(-1.0, 0.0, 0.0)), "constant": CONSTANT},
    ),
    "self_inhibiting": Problem(
        lambda u, t0, t1: sd.SelfCorrecting(0.5, 0.2, t0, t1),
        {"true_family": Family(self_correcting, numbers(-1.0, -2.0)), "constant": CONSTANT},
    ),
    "earthquake": Problem(
        None,
        {
            "hawkes": Family(kinds, torch.cat([numbers(*[-3.0] * KINDS, *[0.0] * KINDS), numbers(*[-4.0] * KINDS**2)])),
            "constant": Family(kinds_constant, numbers(*[-2.0] * KINDS)),
        },
    ),
}  # fmt: skip


def log_likelihood(process: Process, jumps: sd.Jumps) -> Tensor:
    """Of all jumps; of kinds given the first jump of each sequence, which its clock starts at."""
    total = process.log_prob(jumps.values).sum()
    if jumps.values.shape[-1] == 1:
        return total
    rates = process.intensities(jumps.t0[:, None], jumps)[:, 0]
    return total - rates.gather(-1, jumps.values[:, 0, 1:].long()).log().sum()


def count(jumps: sd.Jumps) -> int:
    given = len(jumps) if jumps.values.shape[-1] > 1 else 0
    return int(jumps.counts.sum()) - given


def fit(family: Family, jumps: sd.Jumps, steps: int) -> tuple[Tensor, float]:
    """Maximum likelihood by L-BFGS; the parameters and the seconds."""
    start = time.perf_counter()
    u = family.start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([u], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -log_likelihood(family.make(u, jumps.t0, jumps.t1), jumps) / count(jumps)
        loss.backward()
        return loss

    optimiser.step(closure)
    return u.detach(), time.perf_counter() - start


@torch.no_grad()
def mape(found: Process, exact: Process, jumps: sd.Jumps) -> float:
    """Mean absolute percentage error of the intensity over sequences and the grid, in per cent."""
    start, end = float(jumps.t0[0]), float(jumps.t1[0])
    ts = torch.linspace(start, end, round((end - start) / SPACING) + 1, dtype=torch.float64)
    truth = exact.intensity(ts, jumps)
    return 100 * float(((found.intensity(ts, jumps) - truth).abs() / truth).mean())


@torch.no_grad()
def mark_accuracy(process: sd.MultivariateHawkes | sd.JumpODE, jumps: sd.Jumps) -> float:
    """How often the kind with the largest intensity at the time of a jump is its kind; first jumps left out."""
    times = torch.where(jumps.mask, jumps.times, jumps.t1[:, None])
    likeliest = process.intensities(times, jumps).argmax(-1)
    right = likeliest == jumps.values[..., 1].long()
    return float(right[:, 1:][jumps.mask[:, 1:]].double().mean())


def read(path: Path, part: str, *, marked: bool, most: int | None) -> sd.Jumps:
    with np.load(path) as held:
        bounds = held[f"{part}_offsets"][1:-1]
        rows = np.split(held[f"{part}_times"], bounds)[:most]
        marks = np.split(held[f"{part}_marks"], bounds)[:most] if marked else None
    if marks is None:
        return sd.Jumps.from_list(rows, t0=0.0, t1=100.0)
    rows = [apart(row - row[0]) for row in rows]
    pairs = list(zip(rows, marks, strict=True))
    return sd.Jumps.from_list(pairs, t0=0.0, t1=[row[-1] for row in rows], classes=KINDS)


def apart(times: np.ndarray) -> np.ndarray:
    """The few jumps at one time, as far as the clock can tell, in the order in which they are listed."""
    return np.maximum.accumulate(times) + 1e-9 * np.arange(len(times)) * (
        np.diff(times, prepend=-1.0).min() <= 0
    )


def row(model: str, found: dict[str, float], seconds: float) -> str:
    cells = [found.get("mape"), found.get("mark_accuracy"), seconds]
    shown = "".join(
        f"{'' if x is None else format(x, f'.{d}f'):>9}" for x, d in zip(cells, (2, 3, 1), strict=True)
    )
    return f"{model:<18}{found['log_likelihood']:>11.4f}{shown}"


def measure(name: str, parts: dict[str, sd.Jumps], *, quick: bool) -> dict[str, float]:
    problem, out, steps = PROBLEMS[name], {}, 20 if quick else 150
    train, held = parts["train"], parts["held"]
    exact = None if problem.exact is None else problem.exact(numbers(), held.t0, held.t1)
    print(f"{name}: {len(train)} sequences to train on, {len(held)} held out, {count(held)} jumps")
    print(f"{'':<18}{'LL / jump':>11}{'MAPE %':>9}{'accuracy':>9}{'seconds':>9}")
    if exact is not None:
        out["log_likelihood_exact"] = float(log_likelihood(exact, held)) / count(held)
        print(row("exact", {"log_likelihood": out["log_likelihood_exact"], "mape": 0.0}, 0.0))
        print(f"  {sd.time_rescaling(exact, held)}")
    for model, family in problem.families.items():
        u, seconds = fit(family, train, steps)
        print(f"{model}: exp(u)", *(f"{x:.4f}" for x in u[:3].exp()))
        out |= figures(model, family.make(u, held.t0, held.t1), exact, held, seconds)
    sizes = neural.MARKED if exact is None else neural.SIMULATED
    if quick:
        sizes = {"linear": sizes["linear"]}
    return out | neural_figures(train, parts["validation"], sizes, exact, held, steps)


def neural_figures(
    train: sd.Jumps,
    validation: sd.Jumps,
    sizes: dict[str, neural.Size],
    exact: Process | None,
    held: sd.Jumps,
    steps: int,
) -> dict[str, float]:
    """Of every candidate, and again of the one that the likelihood of the validation part chooses."""
    tried = neural.candidates(train, validation, sizes, log_likelihood, steps)
    out, choice = {}, neural.choose(tried)
    for name, one in tried.items():
        out |= figures(f"{MAIN}_{name}", one.net(held, nodes=None), exact, held, one.seconds)
    weights = sum(p.numel() for p in tried[choice].net.parameters())
    print(f"{MAIN}: {choice}, {weights} parameters, {sum(c.seconds for c in tried.values()):.0f} s for all")
    ending = f"_{MAIN}_{choice}"
    chosen = {k.removesuffix(ending): v for k, v in out.items() if k.endswith(ending)}
    return out | chosen | {f"{key}_{MAIN}": value for key, value in chosen.items()}


@torch.no_grad()
def figures(
    model: str, process: Process, exact: Process | None, held: sd.Jumps, seconds: float
) -> dict[str, float]:
    found = {"log_likelihood": float(log_likelihood(process, held)) / count(held)}
    if exact is not None:
        found["mape"] = mape(process, exact, held)
    if isinstance(process, sd.MultivariateHawkes | sd.JumpODE) and held.values.shape[-1] > 1:
        found["mark_accuracy"] = mark_accuracy(process, held)
    print(row(model, found, seconds))
    rescaled = sd.time_rescaling(process, held, given=int(exact is None))
    print(f"  {rescaled}", flush=True)
    found["ks_pvalue"] = rescaled.ks_pvalue
    return {f"{key}_{model}": value for key, value in found.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--process", choices=sorted(PROBLEMS), default="exponential_hawkes")
    parser.add_argument(
        "--test", type=Path, help="npz with test_times, test_offsets; else the validation part"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="at most 60 sequences to train on")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    folder = os.environ.get("STOCHDYN_DATA")
    if not folder:
        print(
            "STOCHDYN_DATA is not set: it names the folder of events_*_train_val.npz. Nothing was measured."
        )
        return
    torch.set_num_threads(chosen.threads)
    marked = chosen.process == "earthquake"
    own = Path(folder) / f"events_{chosen.process}_train_val.npz"
    train = read(own, "train", marked=marked, most=60 if chosen.quick else None)
    validation = read(own, "dev" if marked else "val", marked=marked, most=None)
    held = read(chosen.test, "test", marked=marked, most=None) if chosen.test else validation
    parts = {"train": train, "validation": validation, "held": held}
    found = measure(chosen.process, parts, quick=chosen.quick)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
