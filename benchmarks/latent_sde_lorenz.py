"""How fast a latent SDE trains: stochdyn against torchsde (and JAX where it is installed), in one process.

The problem is that of torchsde's own latent-SDE example: the stochastic Lorenz attractor, 100 observations of three
channels on [0, 2], latent size 4, context 64, networks of width 128, 200 Euler steps.

    python benchmarks/latent_sde_lorenz.py                    # everything, an hour or two on two cores
    python benchmarks/latent_sde_lorenz.py --quick            # batch 64, steps and memory only, under a minute
    python benchmarks/latent_sde_lorenz.py --json out.json    # the figures as flat keys

Ratios are the peer's time (or memory) over ours: more is better. The rows "control" are like for like: the same
networks, the same number of steps, a guide by another drift and torchsde's estimator. Messages and marginals need no
posterior drift. Times are medians over rounds in which all contenders take turns.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from lorenz_peers import (
    NOISE,
    TINY,
    JaxScan,
    Sizes,
    Take,
    jax_or_none,
    lorenz,
    memory_here,
    memory_options,
    peer_taker,
    problem,
    standardised,
)
from torch import Tensor, nn

import stochdyn as sd

HERE = Path(__file__).parent
CHECK_EVERY, DRAWS, PATIENCE = 25, 4, 1.0
Clock = Callable[[], float]


def series_of(sizes: Sizes, xs: Tensor) -> sd.Series:
    return sd.Series(sizes.ts, xs.transpose(0, 1).contiguous())


# Ours.


@dataclass(frozen=True)
class Guide:
    """How our guide is made and trained; `lr` is for the time to an ELBO."""

    paths: Callable[[Sizes], object]
    bound: sd.AbstractObjective
    lr: float = 1e-2


GUIDES = {
    "control": Guide(
        lambda s: sd.PosteriorDrift(hidden=(s.hidden, s.hidden), context=s.context),
        sd.ELBO(estimator=sd.AnalyticKL()),
    ),
    "messages": Guide(lambda s: sd.FreeMessage(rank=0), sd.ELBO()),
    "messages, full": Guide(lambda s: sd.FreeMessage(), sd.ELBO()),
    "marginals": Guide(lambda s: sd.Marginals(), sd.PathELBO()),
}


def ours(sizes: Sizes, kind: str, loop: sd.Compiled | None = None) -> sd.LatentSDE:
    decoder = sd.NormalDecoder(nn.Linear(sizes.latent, 3), 3, scale=NOISE, learned=False)
    paths = GUIDES[kind].paths(sizes)
    return sd.LatentSDE(
        3, sizes.latent, hidden=sizes.hidden, substeps=2, decoder=decoder, paths=paths, loop=loop
    )


def learned(model: sd.LatentSDE) -> list[nn.Parameter]:
    return [*model.parameters(), *model.guide.parameters()]


def our_taker(model: sd.LatentSDE, kind: str, batch: sd.Series) -> Take:
    bound = GUIDES[kind].bound
    with pyro.validation_enabled(False):
        model.guide(batch)
    parameters = learned(model)

    def take() -> None:
        for parameter in parameters:
            parameter.grad = None
        with pyro.validation_enabled(False):
            (bound.loss(model, model.guide, batch) / len(batch)).backward()

    return take


def taker(sizes: Sizes, name: str, series: int, loop: sd.Compiled | None = None) -> Take:
    """The gradient step of a contender on some series."""
    xs = problem(sizes, series)
    if name == "torchsde":
        return peer_taker(sizes.peer(), xs, sizes.ts)
    return our_taker(ours(sizes, name, loop), name, series_of(sizes, xs))


# Time per gradient step.


def interleaved(takers: dict[str, Take], rounds: int, clock: Clock) -> dict[str, float]:
    """Median seconds of each; the first call of each is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in takers}
    for take in takers.values():
        take()
    for _ in range(rounds):
        for name, take in takers.items():
            started = clock()
            take()
            spent[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in spent.items()}


def steps(
    sizes: Sizes, series: int, rounds: int, compiled: list[str], clock: Clock
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per gradient step, and seconds of first calls where something is compiled."""
    takers = {name: taker(sizes, name, series) for name in ("torchsde", *GUIDES)}
    loops = {kind: sd.Compiled(chunk=10) for kind in compiled}
    for kind, loop in loops.items():
        takers[f"{kind}, compiled"] = taker(sizes, kind, series, loop)
    jax = jax_or_none(torch.get_num_threads())
    first: dict[str, float] = {}
    if jax is not None:
        takers["jax"] = JaxScan(jax, problem(sizes, series), sizes.ts, sizes.peer()).take
    for name in [name for name in takers if name == "jax" or name.endswith("compiled")]:
        started = time.perf_counter()
        takers[name]()
        first[name] = time.perf_counter() - started
    return interleaved(takers, rounds, clock), first


# Time to an ELBO.


def batches(size: int, of: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(of, generator=generator)[:size]


def peer_run(
    sizes: Sizes, train: Tensor, test: Tensor, seed: int, count: int, clock: Clock
) -> tuple[float, float]:
    """Seconds of the peer's steps, and its held-out ELBO at the end; lr 1e-2, times .997 after every step."""
    torch.manual_seed(seed)
    peer, stream, spent = sizes.peer(), batches(sizes.series, train.shape[1], seed), 0.0
    adam = torch.optim.Adam(peer.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.997)
    for _ in range(count):
        xs = train[:, next(stream)]
        started = clock()
        adam.zero_grad()
        (-peer.elbo(xs, sizes.ts).mean()).backward()
        adam.step()
        decay.step()
        spent += clock() - started
    with torch.no_grad():
        return spent, statistics.fmean(float(peer.elbo(test, sizes.ts).mean()) for _ in range(DRAWS))


@torch.no_grad()
def held_out(model: sd.LatentSDE, kind: str, batch: sd.Series) -> float:
    """The bound per held-out series; marginals are simulated on the grid, so that all bounds are of one kind."""
    bound = sd.ELBO() if kind == "marginals" else GUIDES[kind].bound
    model.guide.eval()
    values = [-float(bound.loss(model, model.guide, batch)) / len(batch) for _ in range(DRAWS)]
    model.guide.train()
    return statistics.fmean(values)


def seconds_to(
    sizes: Sizes,
    kind: str,
    target: float,
    train: sd.Series,
    test: sd.Series,
    seed: int,
    limit: float,
    clock: Clock,
) -> float:
    """Seconds of our steps until the held-out bound passes the target; infinite past the limit."""
    torch.manual_seed(seed)
    model, bound, spent = ours(sizes, kind), GUIDES[kind].bound, 0.0
    stream = batches(sizes.series, len(train), seed)
    with pyro.validation_enabled(False):
        model.guide(train[: sizes.series])
        adam = torch.optim.Adam(learned(model), lr=GUIDES[kind].lr)
        while spent < limit:
            for _ in range(CHECK_EVERY):
                batch = train[next(stream)]
                started = clock()
                adam.zero_grad()
                (bound.loss(model, model.guide, batch) / len(batch)).backward()
                adam.step()
                spent += clock() - started
            if held_out(model, kind, test) > target:
                return spent
    return math.inf


def time_to_elbo(sizes: Sizes, seeds: int, count: int, clock: Clock) -> dict[str, float]:
    """The peer's seconds over ours, by guide: medians over seeds; 0 where the ELBO was not reached in time."""
    ratios: dict[str, list[float]] = {kind: [] for kind in GUIDES}
    raw = lorenz(sizes, sizes.train, seed=1)
    train = standardised(raw, raw, seed=1)
    test = standardised(lorenz(sizes, sizes.held_out, seed=2), raw, seed=2)
    data, fresh = series_of(sizes, train), series_of(sizes, test)
    print(f"\nseconds to torchsde's held-out ELBO after {count} steps (lr 1e-2, x .997 per step)")
    for seed in range(seeds):
        spent, target = peer_run(sizes, train, test, seed, count, clock)
        print(f"  seed {seed}: torchsde {target:.0f} nats per series in {spent:.1f} s", flush=True)
        for kind, guide in GUIDES.items():
            own = seconds_to(sizes, kind, target, data, fresh, seed, PATIENCE * spent, clock)
            ratios[kind].append(spent / own)
            note = f"{own:8.1f} s" if own < math.inf else f"not within {PATIENCE * spent:.1f} s"
            print(f"    {kind:<20} lr {guide.lr:g} {note:>12}   ratio {spent / own:.2f}", flush=True)
    return {kind: statistics.median(values) for kind, values in ratios.items()}


# Memory, in a process of its own.


def memory_of(name: str, series: int, tiny: bool) -> float:
    """Largest resident set in MiB of a process that takes three gradient steps, its imports included."""
    script = HERE / ("lorenz_peers.py" if name == "torchsde" else "latent_sde_lorenz.py")
    command = [sys.executable, str(script), "--memory", name, "--series", str(series), *["--tiny"] * tiny]
    command += ["--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


# The report.


def report(batch: int, seconds: dict[str, float], first: dict[str, float]) -> dict[str, float]:
    print(f"\nbatch {batch}, {torch.get_num_threads()} threads: seconds per gradient step, ratio to torchsde")
    for name, value in seconds.items():
        note = f"   (first call {first[name]:.0f} s)" if name in first else ""
        print(f"  {name:<20} {value:10.4f} {seconds['torchsde'] / value:7.2f}{note}")
    best = min(seconds[name] for name in ("control", "control, compiled") if name in seconds)
    messages = min(seconds[name] for name in seconds if name.startswith("messages"))
    found = {
        f"step_ratio_torchsde_{batch}": seconds["torchsde"] / best,
        f"message_ratio_torchsde_{batch}": seconds["torchsde"] / messages,
        f"marginal_ratio_torchsde_{batch}": seconds["torchsde"] / seconds["marginals"],
    }
    if "control, compiled" in seconds:
        found[f"step_ratio_torchsde_{batch}_uncompiled"] = seconds["torchsde"] / seconds["control"]
    if "jax" in seconds:
        found[f"step_ratio_jax_{batch}"] = seconds["jax"] / best
    return found


def memory(names: list[str], series: int, tiny: bool) -> dict[str, float]:
    peak = {name: memory_of(name, series, tiny) for name in ("torchsde", *names)}
    print(f"\nbatch {series}: largest resident set in MiB, ratio to torchsde")
    for name, value in peak.items():
        print(f"  {name:<20} {value:10.0f} {peak['torchsde'] / value:7.2f}")
    return {"peak_memory_ratio": peak["torchsde"] / peak["control"]}


def run(options: argparse.Namespace) -> dict[str, float]:
    sizes, quick = TINY if options.tiny else Sizes(), options.quick
    clock = time.process_time if options.cpu_time else time.perf_counter
    compiled = ["control", "messages"] if options.compile else []
    found = report(64, *steps(sizes, sizes.series, 3 if quick else options.rounds, compiled, clock))
    if not quick:
        found |= report(1024, *steps(sizes, sizes.many, max(options.rounds // 3, 1), compiled[:1], clock))
    guides = ["control"] if quick or options.tiny else list(GUIDES)
    found |= memory(guides, sizes.series if quick else sizes.many, options.tiny)
    if not quick and options.seeds:
        ratios = time_to_elbo(sizes, options.seeds, options.steps, clock)
        found["time_to_elbo_ratio"] = max(ratios.values())
        found |= {f"time_to_elbo_ratio_{kind.replace(', ', '_')}": value for kind, value in ratios.items()}
    return found


def main() -> None:
    if "--memory" in sys.argv:
        memory_here(memory_options().parse_args(), taker)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 64, steps and memory only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also compiled loops; default: unless --quick",
    )
    parser.add_argument("--seeds", type=int, default=3, help="for the time to an ELBO; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=500, help="of torchsde, to set the ELBO to reach")
    parser.add_argument("--rounds", type=int, default=15, help="of timing; a third of them at batch 1024")
    parser.add_argument("--threads", type=int, help="of torch and JAX")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds of steps: for a busy machine"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is None:
        options.compile = not options.quick
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = run(options)
    print("\n" + "\n".join(f"{name:<36} {value:8.2f}" for name, value in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
