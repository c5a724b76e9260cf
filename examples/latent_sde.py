# %% [markdown]
# # A latent SDE: dynamics learned from noisy, irregular series
#
# Noisy Van der Pol oscillators, each seen at irregular times of its own, with holes. The question:
# does a neural SDE that was given no equation learn enough to forecast series that it never saw?

# %%
import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from pyro.infer import Trace_ELBO

import stochdyn as sd

NOISE = 0.1

# %% [markdown]
# The data: dx = v dt + .1 dW, dv = ((1 - x^2) v - x) dt + .1 dW, simulated in steps of .01; every series has times of
# its own, and one value in ten is missing.


# %%
def oscillators(series: int, points: int, seed: int) -> sd.Series:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fine, z = 0.01, 2 * normal(series, 2)
    rows = [z]
    for _ in range(800):
        x, v = z.unbind(-1)
        drift = torch.stack([v, (1 - x.square()) * v - x], -1)
        z = z + drift * fine + 0.1 * fine**0.5 * normal(series, 2)
        rows.append(z)
    path = torch.stack(rows, 1)
    index = torch.rand(series, 799, generator=generator).argsort(-1)[:, : points - 1].sort(-1).values + 1
    index = torch.cat([torch.zeros(series, 1, dtype=torch.long), index], -1)
    values = path.gather(1, index[..., None].expand(-1, -1, 2))
    values = values + NOISE * normal(*values.shape)
    mask = torch.rand(values.shape, generator=generator) > 0.1
    return sd.Series(index.double() * fine, values, mask=mask, channels=["x", "v"])


def elbo(model: sd.LatentSDE, data: sd.Series, draws: int) -> float:
    """Per series, averaged over draws."""
    model.eval()
    model.guide.eval()
    with torch.no_grad():
        loss = sum(Trace_ELBO().loss(model, model.guide, data) for _ in range(draws)) / draws
    return -loss / len(data)


# %%
def main(smoke: bool = False, out: Path = Path("examples/output")) -> None:
    mpl.use("Agg")
    torch.set_num_threads(1)  # tensors this small are slower on several
    torch.manual_seed(0)
    training = oscillators(16 if smoke else 64, 10 if smoke else 28, seed=1)
    held_out = oscillators(4 if smoke else 32, 10 if smoke else 28, seed=2)

    model = sd.LatentSDE(obs_dim=2, state_dim=2, hidden=32, substeps=2, noise=0.3)
    before = elbo(model, held_out, draws=5)
    fit = sd.fit(
        model, model.guide, training, steps=10 if smoke else 300, batch_size=None if smoke else 32, lr=0.02
    )
    print(fit)
    after = elbo(model, held_out, draws=20)
    print(f"Held-out ELBO per series: {before:.1f} untrained, {after:.1f} trained")
    print(f"Noise, in truth {NOISE}: {[round(s, 3) for s in model.decoder.log_scale.exp().tolist()]}")

    # The second half of every series is hidden, and forecast from the first.
    half = held_out.values.shape[1] // 2
    shown = held_out.mask.clone()
    shown[:, half:] = False
    first = sd.Series(held_out.times, held_out.values, mask=shown, channels=["x", "v"])
    forecast = sd.predict(fit, first, draws=50 if smoke else 300)
    low, high = forecast.quantile(0.05), forecast.quantile(0.95)
    hidden = held_out.mask & ~shown
    inside = ((held_out.values >= low) & (held_out.values <= high))[hidden].double().mean()
    print(f"90 % forecast intervals hold {inside:.0%} of what came")

    out.mkdir(parents=True, exist_ok=True)
    axes = sd.plot_forecast(forecast, observed=held_out)
    axes[0].figure.savefig(out / "latent_sde.png", dpi=150)
    print(f"Wrote {out / 'latent_sde.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A latent neural SDE on noisy Van der Pol oscillators.")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that it works")
    main(parser.parse_args().smoke)
