"""The bridge to ArviZ, and the only file that imports it."""

import warnings
from typing import Any

import xarray as xr

with warnings.catch_warnings():
    # ArviZ 0.x announces 1.0 on its first import of the day.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az


def to_inference_data(tree: xr.DataTree) -> Any:
    """Turn a tree into what the installed ArviZ works on.

    The choice is by version number: ArviZ 1.x still answers `hasattr(az, "InferenceData")` with yes.

    Args:
        tree: what `build_tree` returns.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, the tree itself with ArviZ 1.x and later.

    Example:
        >>> import numpy as np
        >>> from stochdyn.diagnostics import Variable, build_tree, to_inference_data
        >>> mu = Variable(("draw",), np.random.default_rng(0).normal(size=500))
        >>> data = to_inference_data(build_tree({"posterior": {"mu": mu}}))
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 500}
    """
    major = int(az.__version__.split(".")[0])
    return az.from_datatree(tree) if major == 0 else tree
