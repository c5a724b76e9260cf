"""What a user runs first: the import, and the examples."""

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from pyro.util import get_rng_state, set_rng_state

ROOT = Path(__file__).parents[1]
LYNX_HARE = ROOT / "examples" / "lynx_hare.py"
HIERARCHY = ROOT / "examples" / "hierarchy.py"
KNOWN_PHYSICS = ROOT / "examples" / "known_physics.py"
CENSORED = ROOT / "examples" / "censored.py"
TIPPING_POINTS = ROOT / "examples" / "tipping_points.py"
EARTHQUAKES = ROOT / "examples" / "earthquakes.py"
NEURAL_JUMP_ODE = ROOT / "examples" / "neural_jump_ode.py"
RARE_FAULTS = ROOT / "examples" / "rare_faults.py"
LATENT_SDE = ROOT / "examples" / "latent_sde.py"
OBJECTIVES = ROOT / "examples" / "objectives.py"
BOUNCING_BALL = ROOT / "examples" / "bouncing_ball.py"
ELECTRICITY = ROOT / "examples" / "electricity.py"
OBSERVATION_JUMPS = ROOT / "examples" / "observation_jumps.py"
THEOPHYLLINE = ROOT / "examples" / "theophylline.py"
INFORMATIVE_TIMES = ROOT / "examples" / "informative_times.py"


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


@pytest.fixture
def smoke(tmp_path, monkeypatch, capsys):
    """Runs an example as its command does, in an empty folder but in this process; gives what it printed."""

    def run(example, warned="ignore"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(example), "--smoke"])
        state, threads = get_rng_state(), torch.get_num_threads()
        with warnings.catch_warnings(), mpl.rc_context():
            warnings.simplefilter(warned)
            try:
                runpy.run_path(str(example), run_name="__main__")
            finally:
                set_rng_state(state)
                torch.set_num_threads(threads)
                plt.close("all")
        return capsys.readouterr().out

    return run


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


@pytest.mark.skipif(not OBJECTIVES.exists(), reason="an installed package has no examples")
def test_objectives(smoke):
    printed = smoke(OBJECTIVES, warned="error")
    rows = re.findall(r"^(ELBO|IWAE).*-\d+\.\d+ \+- \d+\.\d+ +\d+\.\d+ +\d+$", printed, re.MULTILINE)
    assert rows == ["ELBO"] * 3 + ["IWAE"] * 2


@pytest.mark.skipif(not HIERARCHY.exists(), reason="an installed package has no examples")
def test_hierarchy(tmp_path, smoke):
    printed = smoke(HIERARCHY)
    assert re.search(r"^40 patients trained on: 90 % intervals hold \d+%", printed, re.MULTILINE)
    assert re.search(
        r"^20 patients never seen, of new clinics: 90 % intervals hold \d+%", printed, re.MULTILINE
    )
    assert (tmp_path / "examples" / "output" / "hierarchy.png").stat().st_size > 10_000


@pytest.mark.skipif(not KNOWN_PHYSICS.exists(), reason="an installed package has no examples")
def test_known_physics(tmp_path, smoke):
    printed = smoke(KNOWN_PHYSICS, warned="error")
    error, without = map(float, re.search(r"error (\d\.\d+), with no network (\d\.\d+)", printed).groups())
    assert 0 < error < without
    assert re.search(r"^The 95 % interval holds the truth at \d+% of the points", printed, re.MULTILINE)
    assert (tmp_path / "examples" / "output" / "known_physics.png").stat().st_size > 10_000


@pytest.mark.skipif(not CENSORED.exists(), reason="an installed package has no examples")
def test_censored(tmp_path, smoke):
    printed = smoke(CENSORED)
    rows = re.findall(r"^(.*?) +rate \d\.\d+ \[\d\.\d+, \d\.\d+\]", printed, re.MULTILINE)
    assert rows == ["dropped", "half the limit", "censored", "nothing lost"]
    assert (tmp_path / "examples" / "output" / "censored.png").stat().st_size > 10_000


@pytest.mark.skipif(not TIPPING_POINTS.exists(), reason="an installed package has no examples")
def test_tipping_points(tmp_path, smoke):
    printed = smoke(TIPPING_POINTS)
    assert "truth: stable node at -0.38, unstable node at 0.69, stable node at 1.99" in printed
    assert re.search(r"^probability of alternative stable states: [01]\.\d\d$", printed, re.MULTILINE)
    assert (tmp_path / "examples" / "output" / "tipping_points.png").stat().st_size > 10_000


@pytest.mark.skipif(not BOUNCING_BALL.exists(), reason="an installed package has no examples")
def test_bouncing_ball(tmp_path, smoke):
    printed = smoke(BOUNCING_BALL)
    assert re.search(r"^gravity \d+\.\d+ \+- 0\.\d+, truth 9.81$", printed, re.MULTILINE)
    found = re.findall(r"bounces until they accumulate, at \d+\.\d+ s: at rest$", printed, re.MULTILINE)
    assert len(found) == 3
    assert (tmp_path / "examples" / "output" / "bouncing_ball.png").stat().st_size > 10_000


@pytest.mark.skipif(not THEOPHYLLINE.exists(), reason="an installed package has no examples")
def test_theophylline(tmp_path, monkeypatch, smoke):
    monkeypatch.delenv("STOCHDYN_DATA", raising=False)
    printed = smoke(THEOPHYLLINE)
    assert "12 patients, simulated" in printed
    for name in ("absorption", "clearance", "volume", "lag"):
        assert re.search(rf"^{name} +\d+\.\d+ .*\[\d+\.\d+, \d+\.\d+\]$", printed, re.MULTILINE), name
    assert (tmp_path / "examples" / "output" / "theophylline.png").stat().st_size > 10_000


@pytest.mark.skipif(not ELECTRICITY.exists(), reason="an installed package has no examples")
def test_electricity(tmp_path, monkeypatch, smoke):
    monkeypatch.delenv("STOCHDYN_DATA", raising=False)
    printed = smoke(ELECTRICITY)
    assert "simulated prices, 200 days" in printed
    for name in ("level", "pull", "noise", "often", "heat", "shift", "spread"):
        found = re.search(rf"^{name} +-?\d+\.\d+ +\[-?\d+\.\d+, -?\d+\.\d+\] +\(truth", printed, re.MULTILINE)
        assert found, name
    assert re.search(
        r"^\d+ days jumped with a probability above one half; expected \d+$", printed, re.MULTILINE
    )
    assert (tmp_path / "examples" / "output" / "electricity.png").stat().st_size > 10_000


@pytest.mark.skipif(not EARTHQUAKES.exists(), reason="an installed package has no examples")
def test_earthquakes(tmp_path, monkeypatch, smoke):
    monkeypatch.delenv("STOCHDYN_DATA", raising=False)
    printed = smoke(EARTHQUAKES, warned="error")
    assert "simulated data" in printed
    for name in ("base", "decay", "smallest", "growth"):
        assert re.search(rf"^{name} +\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]$", printed, re.MULTILINE), name
    assert re.search(r"^Poisson +\d+ rescaled gaps: KS 0\.\d+", printed, re.MULTILINE)
    assert (tmp_path / "examples" / "output" / "earthquakes.png").stat().st_size > 10_000


@pytest.mark.skipif(not INFORMATIVE_TIMES.exists(), reason="an installed package has no examples")
def test_informative_times(tmp_path, smoke):
    printed = smoke(INFORMATIVE_TIMES, warned="error")
    row = (
        r"^(taken as given|modelled) +mean +-?\d\.\d\d \[.*\], between visits off by +-?\d\.\d\d, cover \d+%$"
    )
    assert re.findall(row, printed, re.MULTILINE) == ["taken as given", "modelled"] * 2
    assert len(re.findall(r"^ +pull +-?\d\.\d\d \[.*\]$", printed, re.MULTILINE)) == 2
    assert (tmp_path / "examples" / "output" / "informative_times.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not INFORMATIVE_TIMES.exists(), reason="an installed package has no examples")
def test_times_taken_as_given_bias_the_average_and_times_modelled_do_not():
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        example = runpy.run_path(str(INFORMATIVE_TIMES), run_name="informative_times")
        torch.set_num_threads(1)
        study = example["simulate"](40, 1.0, 1)
        given, modelled = (example["fitted"](study, joint, 150, 500) for joint in (False, True))
        idle = example["simulate"](40, 0.0, 1)
        control = example["fitted"](idle, True, 150, 500)
    torch.set_num_threads(threads)
    low, _, high = given.interval("mean")
    assert low > 0.3  # 0 is the truth
    low, _, high = modelled.interval("mean")
    assert low < 0 < high
    low, mid, _ = modelled.interval("pull")
    assert low > 0.8 and abs(mid - 1) < 0.12
    low, _, high = control.interval("pull")
    assert low < 0 < high
    # Between visits too, and for every patient together: the intervals of the model with the visits hold the truth.
    (off, _), (less, cover) = (example["between"](study, found) for found in (given, modelled))
    assert off > 0.7 > 0.25 > abs(less) and cover > 0.82


@pytest.mark.skipif(not NEURAL_JUMP_ODE.exists(), reason="an installed package has no examples")
def test_neural_jump_ode(tmp_path, smoke):
    printed = smoke(NEURAL_JUMP_ODE, warned="error")
    assert re.search(
        r"^error of the intensity \d+\.\d %, of a constant one \d+\.\d %$", printed, re.MULTILINE
    )
    assert re.search(r"^found +\d+ rescaled gaps: KS 0\.\d+", printed, re.MULTILINE)
    assert (tmp_path / "examples" / "output" / "neural_jump_ode.png").stat().st_size > 10_000


@pytest.mark.skipif(not RARE_FAULTS.exists(), reason="an installed package has no examples")
def test_rare_faults(tmp_path, smoke):
    printed = smoke(RARE_FAULTS)
    for name in ("Gaussian message", "flow"):
        assert re.search(rf"^{name}: ELBO -\d\.\d+ of the evidence, per machine$", printed, re.MULTILINE), (
            name
        )
    told = re.findall(
        r"^  ([017]) faults in 5 months: told from .* \d+\.\d% of the time$", printed, re.MULTILINE
    )
    assert told == ["0", "1", "7"] * 2
    assert (tmp_path / "examples" / "output" / "rare_faults.png").stat().st_size > 10_000


@pytest.mark.skipif(not LATENT_SDE.exists(), reason="an installed package has no examples")
def test_latent_sde(tmp_path, smoke):
    printed = smoke(LATENT_SDE)
    row = r"^(\S.*?) +(in the holes|ahead) +(calm|restless) +\d+\.\d% \+- \d+\.\d%, width \d\.\d\d$"
    found = re.findall(row, printed, re.MULTILINE)
    models, places, kinds = ("learned", "one size", "true"), ("in the holes", "ahead"), ("calm", "restless")
    assert found == [(model, place, kind) for model in models for place in places for kind in kinds]
    assert re.search(r"^drift at .*: -?\d\.\d\d \(0\.60\), .* \(-0\.60\)$", printed, re.MULTILINE)
    assert re.search(r"^diffusion at .* \(0\.55\), .* \(0\.80\), .* \(1\.05\)$", printed, re.MULTILINE)
    assert (tmp_path / "examples" / "output" / "latent_sde.png").stat().st_size > 10_000


@pytest.mark.skipif(not OBSERVATION_JUMPS.exists(), reason="an installed package has no examples")
def test_observation_jumps(tmp_path, smoke):
    printed = smoke(OBSERVATION_JUMPS, warned="error")
    row = r"^(\S+) +log likelihood of a reading (-?\d\.\d+)$"
    found = dict(re.findall(row, printed, re.MULTILINE))
    assert float(found["learned"]) < float(found["Kalman"])
    row = r"^(\S+) +passes, (drawn jointly|time by time): in \d+% \(Brier score 0\.\d+\)$"
    kinds = ("drawn jointly", "time by time")
    assert re.findall(row, printed, re.MULTILINE) == [(m, k) for m in ("learned", "Kalman") for k in kinds]
    assert (tmp_path / "examples" / "output" / "observation_jumps.png").stat().st_size > 10_000


STATE = """
import json, random, sys, warnings
import matplotlib, numpy, pyro, torch
import pyro.distributions, xarray
from torch.distributions import Distribution

def state():
    return [
        str(torch.get_default_dtype()), Distribution._validate_args, pyro.distributions.Normal._validate_args,
        pyro.infer.util.is_validation_enabled(), pyro.poutine.runtime._PYRO_STACK == [],
        {k: str(v) for k, v in dict.items(matplotlib.rcParams)}, repr(warnings.filters),
        str(torch.get_rng_state().sum()), str(numpy.random.get_state()[1].sum()), str(hash(random.getstate())),
        torch.get_num_threads(), torch.is_grad_enabled(), sorted(pyro.get_param_store().keys()),
        str(numpy.geterr()), str(pyro.settings.get()), torch.are_deterministic_algorithms_enabled(),
    ]

before = state()
import stochdyn as sd
after = state()
loaded = [name for name in ("arviz", "matplotlib.pyplot") if name in sys.modules]

from stochdyn import diagnostics
listed = "to_arviz" in dir(sd) and {"to_arviz", "to_inference_data"} <= set(dir(diagnostics))
unknown = hasattr(sd, "to_arvizz") or hasattr(diagnostics, "to_tree")
warnings.simplefilter("ignore")
lazy = "arviz" not in sys.modules and sd.to_arviz is diagnostics.to_arviz and "arviz" in sys.modules
from stochdyn.diagnostics.arviz import to_arviz
same = to_arviz is sd.to_arviz

torch.set_default_dtype(torch.float64)
matplotlib.use("svg")
Distribution.set_default_validate_args(False)
print(json.dumps([before, after, state(), loaded, [listed, not unknown, lazy, same]]))
"""


def differing(before, after):
    return [k for k, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]


def test_the_import_changes_nothing_and_arviz_comes_at_its_first_use():
    printed = python("-c", STATE).stdout.splitlines()[-1]
    before, after, changed, loaded, lazy = json.loads(printed)
    assert differing(before, after) == []
    assert loaded == []
    assert lazy == [True] * 4
    # The control: the dtype, validation, rcParams and the filters of warnings were changed at the end.
    assert differing(before, changed)[:2] == [0, 1]
    assert len(differing(before, changed)) >= 4
