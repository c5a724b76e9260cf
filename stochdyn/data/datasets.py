"""Real data that come with the package.

Example:
    >>> import stochdyn as sd
    >>> len(sd.datasets.lynx_hare())
    1
"""

from importlib import resources

import numpy as np
import torch

from stochdyn.data.series import Series


def lynx_hare(dtype: torch.dtype | None = None) -> Series:
    """Pelts of hare and lynx, in thousands, that the Hudson Bay Company took in from 1900 to 1920.

    Times are years; channels are "hare" and "lynx"; one series.

    References:
        The ten-year cycle in numbers of the lynx in Canada. C. Elton, M. Nicholson, 1942.
        https://doi.org/10.2307/1358
        Modeling basics. P. Howard, 2009 (the figures by year).

    Example:
        >>> import stochdyn as sd
        >>> pelts = sd.datasets.lynx_hare()
        >>> pelts.channels, pelts.values.shape
        (('hare', 'lynx'), torch.Size([1, 21, 2]))
    """
    text = resources.files("stochdyn.data").joinpath("lynx_hare.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    channels = lines[0].split(",")[1:]
    table = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    kind = torch.get_default_dtype() if dtype is None else dtype
    return Series(table[:, 0], table[None, :, 1:], channels=channels, dtype=kind)
