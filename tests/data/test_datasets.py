"""The packaged data are the published ones."""

import torch

import stochdyn as sd

HARE = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1]
HARE += [40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4]
LYNX += [8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]


def test_lynx_hare():
    series = sd.datasets.lynx_hare()
    assert series.values.shape == (1, 21, 2)
    assert series.channels == ("hare", "lynx")
    assert series.times.tolist() == [float(year) for year in range(1900, 1921)]
    assert series.mask.all()
    assert series.values.dtype == torch.get_default_dtype()


def test_lynx_hare_figures():
    values = sd.datasets.lynx_hare(dtype=torch.float64).values[0]
    assert values[:, 0].tolist() == HARE
    assert values[:, 1].tolist() == LYNX
