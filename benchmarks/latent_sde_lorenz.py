"""How fast a latent SDE trains: stochdyn against torchsde (and JAX where it is installed), in one process.

The problem is torchsde's own latent-SDE example: the stochastic Lorenz attractor, 100 observations of three channels
on [0, 2], latent size 4, context 64, networks of width 128, 200 Euler steps.

    python benchmarks/latent_sde_lorenz.py                    # everything, about 40 minutes on two cores
    python benchmarks/latent_sde_lorenz.py --quick            # batch 64, step ratios only, under a minute
    python benchmarks/latent_sde_lorenz.py --json out.json    # the figures as flat keys

Ratios are the peer's time over ours: more is better. The rows "control" are like for like: the same networks, the same
number of steps, a guide by another drift. Messages and marginals need no posterior drift.
"""
