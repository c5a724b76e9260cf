"""How fast a latent SDE trains: stochdyn against torchsde (and JAX where it is installed), in one process.

The problem is torchsde's own latent-SDE example: the stochastic Lorenz attractor, 100 observations of three channels
on [0, 2], latent size 4, context 64, networks of width 128, 200 Euler steps.

    python benchmarks/latent_sde_lorenz.py                    # everything, about an hour on two cores
    python benchmarks/latent_sde_lorenz.py --quick            # batch 64, step ratios only, under a minute
    python benchmarks/latent_sde_lorenz.py --json out.json    # the figures as flat keys

Ratios are the peer's time (or memory) over ours: more is better. The rows "control" are like for like: the same
networks, the same number of steps, a guide by another drift and torchsde's estimator. Messages and marginals need no
posterior drift. Times are medians over rounds in which all contenders take turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch
from lorenz_peers import JaxScan, TorchSDE, jax_or_none
from torch import Tensor, nn

import stochdyn as sd

SIZES = {"data": 3, "latent": 4, "context": 64, "hidden": 128}
NOISE, TIMES = 0.01, torch.linspace(0, 2, 100)
STEPS_OF_PEER, CHECK_EVERY, HELD_OUT = 500, 25, 256
Take = Callable[[], None]


def lorenz(series: int, seed: int) -> Tensor:
    """(time, series, channel): sigma 10, rho 28, beta 8/3, noise .15 on every state; standardised, then noise .01."""
    generator = torch.Generator().manual_seed(seed)
    z, rows, fine = torch.randn(series, 3, generator=generator), [], 20
    for k in range(len(TIMES)):
        rows.append(z)
        h = 2.0 / (len(TIMES) - 1) / fine
        for _ in range(fine if k + 1 < len(TIMES) else 0):
            x, y, w = z.unbind(-1)
            drift = torch.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], -1)
            z = z + drift * h + 0.15 * h**0.5 * torch.randn(z.shape, generator=generator)
    xs = torch.stack(rows)
    xs = (xs - xs.mean((0, 1))) / xs.std((0, 1))
    return xs + NOISE * torch.randn(xs.shape, generator=generator)


def series_of(xs: Tensor) -> sd.Series:
    return sd.Series(TIMES, xs.transpose(0, 1).contiguous())


# Ours.

PATHS = {
    "control": lambda hidden: sd.PosteriorDrift(hidden=(hidden, hidden), context=SIZES["context"]),
    "messages": lambda hidden: sd.FreeMessage(rank=0),
    "messages, full": lambda hidden: sd.FreeMessage(),
    "marginals": lambda hidden: sd.Marginals(),
}
OBJECTIVES = {"control": sd.ELBO(estimator=sd.AnalyticKL()), "marginals": sd.PathELBO()}


def ours(kind: str, loop: sd.Compiled | None = None) -> sd.LatentSDE:
    hidden = SIZES["hidden"]
    decoder = sd.NormalDecoder(nn.Linear(SIZES["latent"], 3), 3, scale=NOISE, learned=False)
    return sd.LatentSDE(
        3, SIZES["latent"], hidden=hidden, substeps=2, decoder=decoder, paths=PATHS[kind](hidden), loop=loop
    )


def objective(kind: str) -> sd.AbstractObjective:
    return OBJECTIVES.get(kind, sd.ELBO())


def taker(model: sd.LatentSDE, kind: str, batch: sd.Series) -> Take:
    bound = objective(kind)

    def take() -> None:
        for parameter in [*model.parameters(), *model.guide.parameters()]:
            parameter.grad = None
        with pyro.validation_enabled(False):
            (bound.loss(model, model.guide, batch) / len(batch)).backward()

    return take


def peer_taker(peer: TorchSDE, xs: Tensor) -> Take:
    def take() -> None:
        peer.zero_grad(set_to_none=True)
        (-peer.elbo(xs, TIMES).mean()).backward()

    return take


# Time per gradient step.


def interleaved(takers: dict[str, Take], rounds: int) -> dict[str, float]:
    """Median seconds of each; the first call of each is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in takers}
    for take in takers.values():
        take()
    for _ in range(rounds):
        for name, take in takers.items():
            started = time.perf_counter()
            take()
            spent[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in spent.items()}


def steps(batch: int, rounds: int, compiled: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per gradient step, and seconds spent compiling."""
    xs = lorenz(batch, seed=0)
    data, sizes = series_of(xs), tuple(SIZES.values())
    takers = {"torchsde": peer_taker(TorchSDE(*sizes, NOISE), xs)}
    takers |= {kind: taker(ours(kind), kind, data) for kind in PATHS}
    loops = {f"{kind}, compiled": sd.Compiled(chunk=10) for kind in ("control", "messages") if compiled}
    for name, loop in loops.items():
        kind = name.removesuffix(", compiled")
        takers[name] = taker(ours(kind, loop), kind, data)
    jax = jax_or_none()
    if jax is not None:
        takers["jax"] = JaxScan(jax, xs, TIMES, sizes, NOISE).take  # type: ignore[arg-type]
    seconds = interleaved(takers, rounds)
    return seconds, {name: loop.seconds for name, loop in loops.items()}


# Time to an ELBO.


@torch.no_grad()
def held_out(model: sd.LatentSDE, kind: str, batch: sd.Series, draws: int = 4) -> float:
    """The bound per held-out series; marginals are simulated on the grid, so that all bounds are of one kind."""
    bound = sd.ELBO() if kind == "marginals" else objective(kind)
    model.guide.eval()
    values = [-float(bound.loss(model, model.guide, batch)) / len(batch) for _ in range(draws)]
    model.guide.train()
    return statistics.fmean(values)


def batches(train: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(train.shape[1], generator=generator)[:size]


def peer_run(train: Tensor, test: Tensor, seed: int, count: int) -> tuple[float, float]:
    """Seconds of its steps, and the held-out ELBO at the end."""
    torch.manual_seed(seed)
    peer, stream, spent = TorchSDE(*SIZES.values(), NOISE), batches(train, 64, seed), 0.0
    adam = torch.optim.Adam(peer.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.997)
    for _ in range(count):
        xs = train[:, next(stream)]
        started = time.perf_counter()
        adam.zero_grad()
        (-peer.elbo(xs, TIMES).mean()).backward()
        adam.step()
        decay.step()
        spent += time.perf_counter() - started
    with torch.no_grad():
        return spent, statistics.fmean(float(peer.elbo(test, TIMES).mean()) for _ in range(4))


def seconds_to(kind: str, target: float, train: Tensor, test: Tensor, seed: int, limit: float) -> float:
    """Seconds of our steps until the held-out bound passes the target; infinite past the limit."""
    torch.manual_seed(seed)
    model, stream, spent, data = ours(kind), batches(train, 64, seed), 0.0, series_of(train)
    fresh, bound = series_of(test), objective(kind)
    model.guide(data[:64])
    adam = torch.optim.Adam([*model.parameters(), *model.guide.parameters()], lr=1e-2)
    with pyro.validation_enabled(False):
        while spent < limit:
            for _ in range(CHECK_EVERY):
                started = time.perf_counter()
                adam.zero_grad()
                (bound.loss(model, model.guide, data[next(stream)]) / 64).backward()
                nn.utils.clip_grad_norm_([*model.parameters(), *model.guide.parameters()], 1e5)
                adam.step()
                spent += time.perf_counter() - started
            if held_out(model, kind, fresh) > target:
                return spent
    return float("inf")


def time_to_elbo(seeds: int, count: int) -> dict[str, float]:
    """The peer's seconds over ours, by guide: medians over seeds."""
    ratios: dict[str, list[float]] = {}
    train, test = lorenz(1024, seed=1), lorenz(HELD_OUT, seed=2)
    for seed in range(seeds):
        spent, target = peer_run(train, test, seed, count)
        print(
            f"seed {seed}: torchsde reaches {target:.0f} nats per series after {count} steps, {spent:.0f} s",
            flush=True,
        )
        for kind in ("messages", "messages, full", "marginals"):
            own = seconds_to(kind, target, train, test, seed, limit=spent)
            print(f"        {kind}: {own:.1f} s", flush=True)
            ratios.setdefault(kind, []).append(spent / own)
    return {kind: statistics.median(values) for kind, values in ratios.items()}


# Memory, in a process of its own.


def memory_of(name: str, batch: int) -> float:
    """Largest resident set in MiB of a process that takes three gradient steps."""
    command = [sys.executable, __file__, "--memory", name, "--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_here(name: str, batch: int) -> None:
    xs = lorenz(batch, seed=0)
    peer = name == "torchsde"
    take = (
        peer_taker(TorchSDE(*SIZES.values(), NOISE), xs) if peer else taker(ours(name), name, series_of(xs))
    )
    for _ in range(3):
        take()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# The report.


def report(batch: int, seconds: dict[str, float], compiling: dict[str, float]) -> dict[str, float]:
    print(f"\nbatch {batch}, {torch.get_num_threads()} threads: seconds per gradient step, ratio to torchsde")
    for name, value in seconds.items():
        note = f"   (compiled in {compiling[name]:.0f} s)" if name in compiling else ""
        print(f"  {name:<22} {value:8.3f} {seconds['torchsde'] / value:6.2f}{note}")
    best = min(seconds[name] for name in ("control", "control, compiled") if name in seconds)
    messages = min(seconds[name] for name in seconds if name.startswith("messages"))
    found = {
        f"step_ratio_torchsde_{batch}": seconds["torchsde"] / best,
        f"message_ratio_torchsde_{batch}": seconds["torchsde"] / messages,
        f"marginal_ratio_torchsde_{batch}": seconds["torchsde"] / seconds["marginals"],
    }
    if "jax" in seconds:
        found[f"step_ratio_jax_{batch}"] = seconds["jax"] / best
    return found


def run(options: argparse.Namespace) -> dict[str, float]:
    compiled = options.compile and not options.quick
    found = report(64, *steps(64, 5 if options.quick else 15, compiled))
    batch = 64 if options.quick else 1024
    if not options.quick:
        found |= report(1024, *steps(1024, 5, False))
    peak = {name: memory_of(name, batch) for name in ("torchsde", "control")}
    found["peak_memory_ratio"] = peak["torchsde"] / peak["control"]
    print(
        f"\npeak memory at batch {batch}: torchsde {peak['torchsde']:.0f} MiB, control {peak['control']:.0f} MiB"
    )
    if not options.quick:
        ratios = time_to_elbo(options.seeds, options.steps)
        found |= {f"time_to_elbo_ratio_{kind.replace(', ', '_')}": value for kind, value in ratios.items()}
        found["time_to_elbo_ratio"] = max(ratios.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 64 alone, under a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=STEPS_OF_PEER, help="of torchsde, to set the ELBO to reach"
    )
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=64, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory_here(options.memory, options.batch)
        return
    found = run(options)
    print("\n" + "\n".join(f"{name:<36} {value:8.2f}" for name, value in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
