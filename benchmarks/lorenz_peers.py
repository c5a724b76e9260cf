"""The problem and the peers of `latent_sde_lorenz.py`: torchsde's example, and the same model as a JAX scan."""

import argparse
import math
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchsde
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

NOISE, STEP = 0.01, 0.01
Take = Callable[[], None]


@dataclass(frozen=True)
class Sizes:
    """Of the problem, and of the data to reach an ELBO on; `tiny` keeps the names of the figures."""

    hidden: int = 128
    context: int = 64
    latent: int = 4
    points: int = 100
    train: int = 1024
    held_out: int = 256
    series: int = 64
    many: int = 1024

    @property
    def ts(self) -> Tensor:
        return torch.linspace(0, 2, 100)[: self.points]

    def peer(self) -> "TorchSDE":
        return TorchSDE(3, self.latent, self.context, self.hidden, NOISE)


TINY = Sizes(hidden=8, context=4, points=6, train=16, held_out=8, series=4, many=8)


@torch.no_grad()
def lorenz(sizes: Sizes, series: int, seed: int, fine: int = 20) -> Tensor:
    """(time, series, channel): sigma 10, rho 28, beta 8/3, noise .15 on every state; standardised, then noise .01."""
    generator = torch.Generator().manual_seed(seed)
    z, h = torch.randn(series, 3, generator=generator), float(sizes.ts[1]) / fine
    rows = [z]
    for _ in range(sizes.points - 1):
        for _ in range(fine):
            x, y, w = z.unbind(-1)
            drift = torch.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], -1)
            z = z + drift * h + 0.15 * math.sqrt(h) * torch.randn(z.shape, generator=generator)
        rows.append(z)
    return torch.stack(rows)


def standardised(xs: Tensor, like: Tensor, seed: int) -> Tensor:
    """In the units of `like`, observed with noise."""
    xs = (xs - like.mean((0, 1))) / like.std((0, 1))
    return xs + NOISE * torch.randn(xs.shape, generator=torch.Generator().manual_seed(1000 + seed))


def problem(sizes: Sizes, series: int) -> Tensor:
    """What gradient steps are timed on."""
    xs = lorenz(sizes, series, seed=0)
    return standardised(xs, xs, seed=0)


# torchsde.


def net(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Softplus(),
        nn.Linear(hidden, hidden),
        nn.Softplus(),
        nn.Linear(hidden, outputs),
    )


class TorchSDE(nn.Module):
    """The latent SDE of torchsde's Lorenz example: `f` is the posterior's drift, `h` the prior's, `g` the diffusion."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self, data: int, latent: int, context: int, hidden: int, noise: float) -> None:
        super().__init__()
        self.gru, self.to_context = nn.GRU(data, hidden), nn.Linear(hidden, context)
        self.start = nn.Linear(context, 2 * latent)
        self.f_net, self.h_net = net(latent + context, latent, hidden), net(latent, latent, hidden)
        self.g_nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.Softplus(), nn.Linear(hidden, 1), nn.Sigmoid())
            for _ in range(latent)
        )
        self.projector = nn.Linear(latent, data)
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(1, latent)) for _ in range(2))
        self.noise = noise

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        at = min(int(torch.searchsorted(self.ts, t, right=True)), len(self.ts) - 1)
        return self.f_net(torch.cat([y, self.context[at]], 1))

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return self.h_net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([g(x) for g, x in zip(self.g_nets, y.split(1, 1), strict=True)], 1)

    def elbo(self, xs: Tensor, ts: Tensor) -> Tensor:
        """Per series, (series,); xs is (time, series, channel)."""
        encoded, _ = self.gru(xs.flip(0))
        self.context, self.ts = self.to_context(encoded).flip(0), ts
        mean, log_scale = self.start(self.context[0]).chunk(2, 1)
        q = Normal(mean, log_scale.exp())
        zs, ratio = torchsde.sdeint(self, q.rsample(), ts, dt=STEP, logqp=True, method="euler")
        seen = Normal(self.projector(zs), self.noise).log_prob(xs).sum((0, 2))
        return seen - kl_divergence(q, Normal(self.loc, self.log_scale.exp())).sum(1) - ratio.sum(0)


def peer_taker(peer: TorchSDE, xs: Tensor, ts: Tensor) -> Take:
    def take() -> None:
        peer.zero_grad(set_to_none=True)
        (-peer.elbo(xs, ts).mean()).backward()

    return take


# JAX.


def jax_or_none(threads: int) -> ModuleType | None:
    """JAX with as many threads as torch, if it is installed."""
    os.environ["NPROC"] = str(threads)  # read once, when JAX first runs
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    try:
        import jax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return jax


class JaxScan:
    """The same model in JAX: jit, one scan over time, the diffusion's nets at once; it starts from torch's weights."""

    def __init__(self, jax: Any, xs: Tensor, ts: Tensor, peer: TorchSDE) -> None:
        self.jax, self.np, self.noise = jax, jax.numpy, peer.noise
        self.xs = self.np.asarray(xs.numpy())
        steps = round(float(ts[-1]) / STEP)
        at = torch.searchsorted(ts, torch.arange(steps) * STEP + 1e-6, right=True).clamp(max=len(ts) - 1)
        self.at, self.keep = (self.np.asarray(i.numpy()) for i in (at, (ts / STEP).round().long()))
        self.parameters = jax.tree.map(lambda p: self.np.asarray(p.detach().numpy()), weights(peer))
        self.key = jax.random.PRNGKey(0)
        self.step = jax.jit(jax.value_and_grad(self.loss))

    def loss(self, P: dict[str, Any], key: Any) -> Any:
        np, jax = self.np, self.jax
        context = (self._encoded(P["gru"]) @ P["context"][0] + P["context"][1])[::-1]
        k0, k1 = jax.random.split(key)
        mean, log_scale = np.split(context[0] @ P["start"][0] + P["start"][1], 2, 1)
        z0 = mean + np.exp(log_scale) * jax.random.normal(k0, mean.shape)
        eps = jax.random.normal(k1, (len(self.at), *z0.shape))
        _, (zs, rate) = jax.lax.scan(lambda z, given: self._step(P, z, *given), z0, (context[self.at], eps))
        zs = np.concatenate([z0[None], zs])[self.keep]
        off = (self.xs - zs @ P["project"][0] - P["project"][1]) / self.noise
        seen = -0.5 * off**2 - math.log(self.noise * math.sqrt(2 * math.pi))
        kl = P["log_scale"] - log_scale - 0.5
        kl += (np.exp(2 * log_scale) + (mean - P["loc"]) ** 2) / (2 * np.exp(2 * P["log_scale"]))
        return -(seen.sum((0, 2)) - kl.sum(1) - rate.sum(0)).mean()

    def _encoded(self, P: tuple[Any, ...]) -> Any:
        np, sigmoid = self.np, self.jax.nn.sigmoid
        given, own, b_given, b_own = P

        def cell(h: Any, x: Any) -> Any:
            (r, z, n), (rh, zh, nh) = np.split(x, 3, 1), np.split(h @ own + b_own, 3, 1)
            z = sigmoid(z + zh)
            h = (1 - z) * np.tanh(n + sigmoid(r + rh) * nh) + z * h
            return h, h

        start = np.zeros((self.xs.shape[1], own.shape[0]))
        return self.jax.lax.scan(cell, start, self.xs[::-1] @ given + b_given)[1]

    def _step(self, P: dict[str, Any], z: Any, context: Any, eps: Any) -> Any:
        np, softplus = self.np, self.jax.nn.softplus

        def drift(layers: Any, x: Any) -> Any:
            (a, b), (c, d), (e, f) = layers
            return softplus(softplus(x @ a + b) @ c + d) @ e + f

        f, h = drift(P["f"], np.concatenate([z, context], 1)), drift(P["h"], z)
        (a, b), (c, d) = P["g"]
        g = self.jax.nn.sigmoid((softplus(z[..., None] * a + b) * c).sum(-1) + d)
        z = z + f * STEP + g * math.sqrt(STEP) * eps
        return z, (z, 0.5 * (((f - h) / g) ** 2).sum(1) * STEP)

    def take(self) -> None:
        self.key, key = self.jax.random.split(self.key)
        self.jax.block_until_ready(self.step(self.parameters, key))


def weights(peer: TorchSDE) -> dict[str, Any]:
    """Of the torch model, inputs first; a linear layer is (weight, bias)."""

    def linear(layer: Any) -> tuple[Tensor, Tensor]:
        return layer.weight.t(), layer.bias

    def layers(net: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
        return [linear(layer) for layer in net if isinstance(layer, nn.Linear)]

    nets = [layers(net) for net in peer.g_nets]
    gru = peer.gru
    return {
        "gru": (gru.weight_ih_l0.t(), gru.weight_hh_l0.t(), gru.bias_ih_l0, gru.bias_hh_l0),
        "context": linear(peer.to_context),
        "start": linear(peer.start),
        "f": layers(peer.f_net),
        "h": layers(peer.h_net),
        "g": [
            (torch.cat([net[0][0] for net in nets]), torch.stack([net[0][1] for net in nets])),
            (torch.stack([net[1][0][:, 0] for net in nets]), torch.cat([net[1][1] for net in nets])),
        ],
        "project": linear(peer.projector),
        "loc": peer.loc[0],
        "log_scale": peer.log_scale[0],
    }


# Memory.


def resident_peak() -> float:
    """In MiB. On Linux from /proc: `getrusage` there counts the process that started this one too."""
    status = Path("/proc/self/status")
    if status.exists():
        row = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(row.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The largest resident set in MiB of three gradient steps.")
    parser.add_argument("--memory", default="torchsde", help="of which contender")
    parser.add_argument("--series", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    return parser


def memory_here(options: argparse.Namespace, taker: Callable[[Sizes, str, int], Take]) -> None:
    torch.set_num_threads(options.threads)
    take = taker(TINY if options.tiny else Sizes(), options.memory, options.series)
    for _ in range(3):
        take()
    print(resident_peak())


if __name__ == "__main__":  # a process of its own, without stochdyn and Pyro
    memory_here(
        memory_options().parse_args(),
        lambda sizes, name, series: peer_taker(sizes.peer(), problem(sizes, series), sizes.ts),
    )
