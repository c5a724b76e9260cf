"""What a user runs first: the import, and the examples."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import arviz as az
import pytest

ROOT = Path(__file__).parents[1]
LYNX_HARE = ROOT / "examples" / "lynx_hare.py"


def python(*args, cwd=ROOT, timeout=100):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("MPLBACKEND", None)
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )


@pytest.mark.skipif(not LYNX_HARE.exists(), reason="an installed package has no examples")
def test_lynx_and_hare(tmp_path):
    done = python("-W", "ignore", str(LYNX_HARE), "--smoke", cwd=tmp_path)
    for name in ("alpha", "beta", "gamma", "delta", "process_noise", "pelt_error"):
        assert re.search(rf"^{name}\s.*\d", done.stdout, re.MULTILINE), name
    assert re.search(r"log evidence -\d+\.\d+, ELBO -\d+\.\d+", done.stdout)
    out = tmp_path / "examples" / "output"
    assert (out / "lynx_hare.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "lynx_hare.png").stat().st_size > 10_000
    posterior = az.from_netcdf(str(out / "lynx_hare.nc"))["posterior"]
    assert posterior["log_population"].dims == ("chain", "draw", "series", "time", "state")
    assert posterior.coords["state"].values.tolist() == ["hare", "lynx"]
    assert posterior.coords["time"].values[[0, -1]].tolist() == [1900.0, 1920.0]


STATE = """
import json, random, sys, warnings
import matplotlib, numpy, pyro, torch
import pyro.distributions, xarray
from torch.distributions import Distribution

def state():
    return [
        str(torch.get_default_dtype()), Distribution._validate_args, pyro.distributions.Normal._validate_args,
        pyro.infer.util.is_validation_enabled(), pyro.poutine.runtime._PYRO_STACK == [],
        dict.__getitem__(matplotlib.rcParams, "backend") is matplotlib.rcsetup._auto_backend_sentinel,
        {k: str(v) for k, v in matplotlib.rcParams.items() if k != "backend"}, repr(warnings.filters),
        str(torch.get_rng_state().sum()), str(numpy.random.get_state()[1].sum()), str(hash(random.getstate())),
        torch.get_num_threads(), torch.is_grad_enabled(), sorted(pyro.get_param_store().keys()),
        str(numpy.geterr()), str(pyro.settings.get()), torch.are_deterministic_algorithms_enabled(),
    ]

before = state()
{action}
after = state()
slow = [name for name in ("arviz", "matplotlib.pyplot", "pandas.plotting", "zuko") if name in sys.modules]
print(json.dumps([before, after, slow]))
"""


def around(action):
    before, after, slow = json.loads(python("-c", STATE.replace("{action}", action)).stdout.splitlines()[-1])
    return [(x, y) for x, y in zip(before, after, strict=True) if x != y], slow


def test_the_import_changes_nothing_and_loads_no_arviz():
    changed, slow = around("import stochdyn")
    assert changed == []
    assert "arviz" not in slow
    assert "matplotlib.pyplot" not in slow


def test_a_change_would_be_seen():
    changed, slow = around(
        "import matplotlib.pyplot; torch.set_default_dtype(torch.float64); warnings.simplefilter('error')"
    )
    assert len(changed) >= 2
    assert "matplotlib.pyplot" in slow


LAZY = """
import sys, warnings
import stochdyn as sd
from stochdyn import diagnostics
assert "arviz" not in sys.modules
assert "to_arviz" in dir(sd) and {"to_arviz", "to_inference_data"} <= set(dir(diagnostics))
assert not hasattr(sd, "to_arvizz") and not hasattr(diagnostics, "to_tree")
from stochdyn.diagnostics import to_inference_data
assert "arviz" in sys.modules
assert sd.to_arviz is diagnostics.to_arviz
from stochdyn.diagnostics.arviz import to_arviz
assert sd.to_arviz is to_arviz
print("done")
"""


def test_arviz_comes_at_the_first_use():
    assert python("-c", LAZY).stdout == "done\n"
