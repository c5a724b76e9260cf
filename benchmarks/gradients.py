"""Three ways to the gradient of a neural ODE: time, peak memory and error, beside torchdiffeq's two.

    python benchmarks/gradients.py              # 1,000 steps of RungeKutta4, batch 512, a net of two layers of 64
    python benchmarks/gradients.py --quick      # 250 steps
    python benchmarks/gradients.py --json out.json

Every way runs in processes of its own, interleaved; peak memory is the growth of the maximum resident set during the
solve and its gradient. The error is that of the parameters' gradient, relative to direct backpropagation through the
same steps in float64. After Rackauckas et al., "A comparison of automatic differentiation and continuous sensitivity
analysis for derivatives of differential equation solutions", 2018, https://arxiv.org/abs/1812.01892
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

import stochdyn as sd

WAYS = ("none", "direct", "checkpointed", "adjoint", "torchdiffeq", "torchdiffeq adjoint")
MEBI = 2**20


class Field(nn.Module):
    """A net that the two libraries call in the same way; it rotates, so that states stay of order 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sd.MLP(8, 8, hidden=(64, 64), activation=torch.tanh)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z) - 0.1 * z


def solve(way: str, field: Field, z0: Tensor, ts: Tensor) -> Tensor:
    """The last state, by one of the ways."""
    if way == "torchdiffeq":
        return torchdiffeq.odeint(field, z0, ts, method="rk4")[-1]
    if way == "torchdiffeq adjoint":
        return torchdiffeq.odeint_adjoint(field, z0, ts, method="rk4")[-1]
    gradient = {"checkpointed": sd.Checkpointed(), "adjoint": sd.Adjoint()}.get(way, sd.Direct())
    # One gap in many pieces: what is kept between its ends is the gradient's own affair.
    ends = ts[[0, -1]]
    return sd.odeint(field, z0, ends, solver=sd.RungeKutta4(len(ts) - 1), gradient=gradient)[:, -1]


def once(way: str, steps: int, series: int, dtype: torch.dtype) -> dict[str, object]:
    """Time, peak memory and gradient of one way, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    field = Field().to(dtype)
    z0, ts = torch.randn(series, 8, dtype=dtype), torch.linspace(0, 5, steps + 1, dtype=dtype)
    warm = solve(way, field, z0, ts[:3])
    if way != "none":
        warm.square().sum().backward()
        field.zero_grad()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "none":
        with torch.no_grad():
            solve(way, field, z0, ts)
        gradient: list[float] = []
    else:
        solve(way, field, z0, ts).square().sum().backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in field.parameters() if p.grad is not None]).tolist()
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"seconds": seconds, "bytes": grown, "gradient": gradient}


def apart(way: str, steps: int, series: int, dtype: str) -> dict[str, object]:
    """`once` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        "--steps",
        str(steps),
        "--series",
        str(series),
        "--dtype",
        dtype,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(steps: int, series: int, rounds: int) -> dict[str, float]:
    """A table of all ways, printed, and its figures."""
    runs: dict[str, list[dict[str, object]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            runs[way].append(apart(way, steps, series, "float32"))
    exact = {way: np.array(apart(way, steps, series, "float64")["gradient"]) for way in WAYS[1:]}
    seconds = {way: float(np.median([r["seconds"] for r in runs[way]])) for way in WAYS}
    sizes = {way: float(np.median([r["bytes"] for r in runs[way]])) for way in WAYS}
    found: dict[str, float] = {}
    print(
        f"{steps} steps, batch {series}, medians of {rounds}; error in float64 against direct backpropagation"
    )
    print(f"{'':22s}{'seconds':>9s}{'ratio':>7s}{'MiB':>9s}{'ratio':>8s}{'error':>10s}")
    for way in WAYS:
        error = np.nan
        if way != "none":
            error = np.linalg.norm(exact[way] - exact["direct"]) / np.linalg.norm(exact["direct"])
        ratio, share = seconds[way] / seconds["direct"], sizes["direct"] / max(sizes[way], MEBI)
        print(f"{way:22s}{seconds[way]:9.2f}{ratio:7.2f}{sizes[way] / MEBI:9.1f}{share:8.1f}{error:10.1e}")
        key = way.replace(" ", "_")
        found |= {
            f"{key}_seconds": seconds[way],
            f"{key}_mebibytes": sizes[way] / MEBI,
            f"{key}_error": float(error),
        }
    found["checkpointed_time_ratio"] = seconds["checkpointed"] / seconds["direct"]
    found["checkpointed_memory_ratio"] = sizes["direct"] / max(sizes["checkpointed"], MEBI)
    found["direct_time_ratio_torchdiffeq"] = seconds["torchdiffeq"] / seconds["direct"]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="250 steps, one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--steps", type=int, help="steps of the solver")
    parser.add_argument("--series", type=int, default=512, help="size of the batch")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    steps = chosen.steps or (250 if chosen.quick else 1000)
    if chosen.way:
        print(json.dumps(once(chosen.way, steps, chosen.series, getattr(torch, chosen.dtype))))
        return
    found = compare(steps, chosen.series, 1 if chosen.quick else chosen.rounds)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
