"""The benchmarks run at tiny sizes, and give the figures that they promise."""

import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="an installed package has no benchmarks")


@pytest.fixture
def lorenz(monkeypatch):
    pytest.importorskip("torchsde")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with torch.random.fork_rng():
        yield importlib.import_module("latent_sde_lorenz")
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    for name in ("latent_sde_lorenz", "lorenz_peers"):
        sys.modules.pop(name, None)


def figures(module, monkeypatch, tmp_path, *flags):
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["latent_sde_lorenz.py", "--tiny", "--rounds", "1", "--json", str(out), *flags]
    )
    module.main()
    return json.loads(out.read_text())


def test_quick_figures_of_the_lorenz_benchmark(lorenz, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lorenz, "memory_of", lambda name, series, tiny: 2.0 if name == "torchsde" else 0.5)
    found = figures(lorenz, monkeypatch, tmp_path, "--quick", "--threads", "1")
    ratios = {"step_ratio_torchsde_64", "message_ratio_torchsde_64", "marginal_ratio_torchsde_64"}
    assert found.keys() - {"step_ratio_jax_64"} == ratios | {"peak_memory_ratio"}
    assert all(0 < value < math.inf for value in found.values())
    assert found["peak_memory_ratio"] == 4.0
    printed = capsys.readouterr().out
    assert "batch 64, 1 threads" in printed
    assert all(f"  {name} " in printed for name in ("torchsde", *lorenz.GUIDES))


def test_all_figures_of_the_lorenz_benchmark(lorenz, monkeypatch, tmp_path):
    monkeypatch.setattr(lorenz, "memory_of", lambda name, series, tiny: 1.0)
    monkeypatch.setattr(lorenz, "CHECK_EVERY", 2)
    monkeypatch.setattr(lorenz, "PATIENCE", 100.0)
    found = figures(
        lorenz, monkeypatch, tmp_path, "--seeds", "1", "--steps", "1", "--no-compile", "--cpu-time"
    )
    steps = {f"{row}_ratio_torchsde_{n}" for row in ("step", "message", "marginal") for n in (64, 1024)}
    assert found.keys() >= steps | {"peak_memory_ratio", "time_to_elbo_ratio"}
    assert all(0 < value < math.inf for value in found.values())
    assert found["time_to_elbo_ratio"] == max(
        found[f"time_to_elbo_ratio_{k}"] for k in ("control", "marginals", "messages", "messages_full")
    )


def test_memory_is_that_of_a_process_of_its_own(lorenz, monkeypatch, capsys):
    held = torch.ones(2**27)  # 512 MiB here, which a child must not be charged with
    peer = lorenz.memory_of("torchsde", 4, tiny=True)
    assert 50 < peer < held.numel() * 4 / 2**20
    monkeypatch.setattr(
        sys, "argv", ["latent_sde_lorenz.py", "--memory", "control", "--series", "4", "--tiny"]
    )
    lorenz.main()
    assert float(capsys.readouterr().out) > 512 + 50


def test_an_elbo_that_is_not_reached_has_no_time(lorenz, monkeypatch):
    monkeypatch.setattr(lorenz, "CHECK_EVERY", 1)
    sizes = lorenz.TINY
    xs = lorenz.problem(sizes, sizes.series)
    data = lorenz.series_of(sizes, xs)
    assert lorenz.seconds_to(sizes, "messages", math.inf, data, data, 0, 1e-3, time.process_time) == math.inf


def test_time_of_a_step_is_a_median_over_rounds_without_the_first_call(lorenz):
    now, lengths = [0.0], iter([50.0, 60.0, 1.0, 7.0, 2.0, 8.0, 100.0, 900.0])

    def take():
        now[0] += next(lengths)

    assert lorenz.interleaved({"a": take, "b": take}, 3, lambda: now[0]) == {"a": 2.0, "b": 8.0}


def test_data_are_standardised_and_noisy(lorenz):
    xs = lorenz.problem(lorenz.Sizes(points=20), 500)
    assert xs.shape == (20, 500, 3)
    torch.testing.assert_close(xs.mean((0, 1)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(xs.std((0, 1)), torch.ones(3), atol=1e-3, rtol=0)
