"""The peers of `latent_sde_lorenz.py`: torchsde's example, and the same model as a JAX scan."""

import math
from types import ModuleType
from typing import Any

import torch
import torchsde
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

STEP = 0.01


def net(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Softplus(),
        nn.Linear(hidden, hidden),
        nn.Softplus(),
        nn.Linear(hidden, outputs),
    )


class TorchSDE(nn.Module):
    """The latent SDE of torchsde's Lorenz example: `f` is the posterior's drift, `h` the prior's, `g` both's diffusion."""

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


def jax_or_none() -> ModuleType | None:
    try:
        import jax
    except ImportError:
        return None
    return jax


class JaxScan:
    """The same networks and steps in JAX: jit, one scan over time, drifts fused with what is scored."""

    def __init__(
        self, jax: Any, xs: Tensor, ts: Tensor, sizes: tuple[int, int, int, int], noise: float
    ) -> None:
        self.jax, self.np, self.noise = jax, jax.numpy, noise
        data, latent, context, hidden = sizes
        self.xs, self.latent, self.hidden = self.np.asarray(xs.numpy()), latent, hidden
        steps = round(float(ts[-1]) / STEP)
        at = torch.searchsorted(ts, torch.arange(steps) * STEP + 1e-6, right=True).clamp(max=len(ts) - 1)
        self.at, self.keep = self.np.asarray(at.numpy()), self.np.asarray((ts / STEP).round().long().numpy())
        self.key = jax.random.PRNGKey(0)
        shapes = {
            "gru_i": (data, 3 * hidden), "gru_h": (hidden, 3 * hidden), "gru_b": (3 * hidden,), "ctx": (hidden, context),
            "start": (context, 2 * latent), "f1": (latent + context, hidden), "f2": (hidden, hidden), "f3": (hidden, latent),
            "h1": (latent, hidden), "h2": (hidden, hidden), "h3": (hidden, latent), "b": (4, hidden), "b3": (2, latent),
            "g1": (latent, hidden), "gb": (latent, hidden), "g2": (latent, hidden), "p": (latent, data),
            "loc": (latent,), "log_scale": (latent,),
        }  # fmt: skip
        keys = jax.random.split(self.key, len(shapes))
        self.parameters = {
            name: jax.random.uniform(k, shape, minval=-1, maxval=1) / math.sqrt(shape[0])
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        self.step = jax.jit(jax.value_and_grad(self.loss))

    def loss(self, P: dict[str, Any], key: Any) -> Any:
        np, jax, nn_ = self.np, self.jax, self.jax.nn

        def gru(h: Any, x: Any) -> Any:
            (r, z, n), (rh, zh, nh) = (
                np.split(x @ P["gru_i"] + P["gru_b"], 3, 1),
                np.split(h @ P["gru_h"], 3, 1),
            )
            r, z = nn_.sigmoid(r + rh), nn_.sigmoid(z + zh)
            h = (1 - z) * np.tanh(n + r * nh) + z * h
            return h, h

        series = self.xs.shape[1]
        _, encoded = jax.lax.scan(gru, np.zeros((series, self.hidden)), self.xs[::-1])
        context = (encoded @ P["ctx"])[::-1]
        k0, k1 = jax.random.split(key)
        mean, log_scale = np.split(context[0] @ P["start"], 2, 1)
        z0 = mean + np.exp(log_scale) * jax.random.normal(k0, mean.shape)
        eps = jax.random.normal(k1, (len(self.at), series, self.latent))

        def body(z: Any, given: Any) -> Any:
            c, e = given
            b = P["b"]
            f = (
                nn_.softplus(nn_.softplus(np.concatenate([z, c], 1) @ P["f1"] + b[0]) @ P["f2"] + b[1])
                @ P["f3"]
                + P["b3"][0]
            )
            h = nn_.softplus(nn_.softplus(z @ P["h1"] + b[2]) @ P["h2"] + b[3]) @ P["h3"] + P["b3"][1]
            g = nn_.sigmoid((nn_.softplus(z[..., None] * P["g1"] + P["gb"]) * P["g2"]).sum(-1)) + 1e-3
            z = z + f * STEP + g * math.sqrt(STEP) * e
            return z, (z, 0.5 * (((f - h) / g) ** 2).sum(1) * STEP)

        _, (zs, rate) = jax.lax.scan(body, z0, (context[self.at], eps))
        zs = np.concatenate([z0[None], zs])[self.keep]
        seen = -0.5 * ((self.xs - zs @ P["p"]) / self.noise) ** 2 - math.log(
            self.noise * math.sqrt(2 * math.pi)
        )
        s = np.exp(P["log_scale"])
        kl = P["log_scale"] - log_scale + (np.exp(2 * log_scale) + (mean - P["loc"]) ** 2) / (2 * s**2) - 0.5
        return -(seen.sum((0, 2)) - kl.sum(1) - rate.sum(0)).mean()

    def take(self) -> None:
        self.key, key = self.jax.random.split(self.key)
        loss, gradient = self.step(self.parameters, key)
        self.jax.block_until_ready(gradient)
