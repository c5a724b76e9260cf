"""The benchmark of conditional expectations: its processes, its loss, and a tiny run."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stochdyn as sd
from tests.problems import within

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="an installed package has no benchmarks")
F64 = torch.float64


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield importlib.import_module("observation_jumps")
    torch.set_num_threads(threads)
    sys.modules.pop("observation_jumps", None)


@pytest.mark.parametrize("name", ["black_scholes", "ou", "heston"])
def test_the_closed_form_is_the_conditional_expectation(module, name):
    process = module.PROCESSES[name]
    x = process.simulate(4000)
    assert torch.equal(x[:, 0], torch.ones(4000, dtype=F64))
    for k, steps in ((0, 30), (50, 1), (70, 10)):
        gap = torch.tensor(steps / 100)
        if process.positive:  # of the growth: whatever the value, and with fewer heavy tails
            found, other = x[:, k + steps] / x[:, k] / process.expected(torch.ones(()), gap), 1.01**steps
        else:
            found, other = x[:, k + steps] - process.expected(x[:, k], gap) + 1, 1.01
        assert within(found[:, None], 1.0)
        if name != "heston":
            assert not within(found[:, None], other)


def test_the_loss_is_that_of_the_paper(module):
    x = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 3.0], [1.0, 1.0, 1.0]], dtype=F64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    before = torch.tensor([[9.0, 1.5, 3.0], [9.0, 5.0, 9.0], [9.0, 9.0, 9.0]], dtype=F64)
    y = x + torch.tensor([0.0, 0.5, 0.0], dtype=F64)
    first = ((0.5 + 1.0) ** 2 + 1.0**2) / 2
    second = (0.5 + 1.5) ** 2
    assert module.loss(x, mask, y, before) == pytest.approx((first + second) / 3)


def test_the_truth_has_the_optimal_loss_and_no_distance(module):
    """A model that is the process itself, against the closed form; the control has another drift."""

    class Exact:
        def __init__(self, batch, x, process, drift):
            self.batch, self.x, self.process, self.drift = batch, x, process, drift

        def until(self, ts=None):
            last, elapsed = module.last_known(self.batch, self.x, self.batch.times if ts is None else ts)
            return self.process.expected(last, elapsed) * (self.drift * elapsed).exp()

        def before(self):
            gaps = self.batch.times.diff(dim=1)
            later = self.process.expected(self.x[:, :-1], gaps) * (self.drift * gaps).exp()
            return torch.cat([self.x[:, :1], later], 1)

    process = module.PROCESSES["black_scholes"]
    batch = sd.Series.from_list(module.observed(process.simulate(300)), dtype=F64)
    x = batch.values[..., 0]
    right, wrong = (module.evaluated(process, Exact(batch, x, process, d), x, batch) for d in (0.0, 1.0))
    assert right["ratio"] == pytest.approx(1.0)
    assert right["distance"] < 1e-20 and right["relative_distance"] < 1e-10
    assert right["last_value_ratio"] > 3
    assert wrong["ratio"] > 1.3
    assert wrong["distance_ratio"] > 1e-3


def test_quick_figures(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "QUICK", replace(module.QUICK, paths=300, steps=60, batch=100))
    out = tmp_path / "out.json"
    argv = ["observation_jumps.py", "--quick", "--process", "ou", "--threads", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()
    found = json.loads(out.read_text())
    keys = {"loss", "optimal", "ratio", "last_value_ratio", "seconds", "cpu_seconds"}
    keys |= {"distance", "distance_ratio", "relative_distance"}
    assert found.keys() == keys
    assert all(0 < value < math.inf for value in found.values())
    assert found["ratio"] == pytest.approx(found["loss"] / found["optimal"])
    assert found["ratio"] < 0.1 * found["last_value_ratio"]
    assert "true conditional expectation" in capsys.readouterr().out
