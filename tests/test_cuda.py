"""Every ready model trains on a GPU, and there it finds what it finds on a CPU."""

import copy
import warnings

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

import stochdyn as sd
from stochdyn.inference import loop
from tests.test_synchronisation import CASES, Normal, Y, no_guide
from tests.waves import waves

MODELS = {
    "latent SDE, messages": lambda: sd.LatentSDE(2, 2, hidden=8, noise=0.5),
    "latent SDE, filter": lambda: sd.LatentSDE(2, 2, hidden=8, noise=0.5, paths=sd.FilterMessage(refine=1)),
    "latent SDE, posterior drift": lambda: sd.LatentSDE(2, 2, hidden=8, paths=sd.PosteriorDrift(hidden=(8,))),
    "observation jumps": lambda: sd.ObservationJumpODE(2, 8),
    "latent ODE": lambda: sd.LatentODE(2, 2, hidden=8, noise=0.5),
    "latent ODE, adaptive": lambda: sd.LatentODE(2, 2, hidden=8, noise=0.5, solver=sd.Dopri5(1e-4, 1e-5)),
}


def trained(make, device):
    torch.manual_seed(0)
    pyro.clear_param_store()
    batch, model = waves(), make()
    model.guide(batch)
    start = copy.deepcopy(model.state_dict())
    fit = sd.fit(model, model.guide, batch, steps=30, lr=0.02, device=device, progress=False)
    moved = max((p.detach().cpu() - start[n].cpu()).abs().max() for n, p in model.state_dict().items())
    here = model.cpu(), model.guide.cpu()
    with torch.no_grad():
        loss = sum(Trace_ELBO().loss(*here, batch) for _ in range(20)) / 20
    assert fit.step == 30
    assert moved > 1e-2
    return loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_trains_on_a_gpu_as_on_a_cpu(name):
    """The noise differs, so the losses agree to a share of what training gains."""
    torch.manual_seed(0)
    untrained = trained_loss(MODELS[name])
    here, there = trained(MODELS[name], None), trained(MODELS[name], "cuda")
    assert there < untrained
    assert abs(here - there) < 0.3 * (untrained - here)


def trained_loss(make):
    batch, model = waves(), make()
    model.guide(batch)
    with torch.no_grad():
        return sum(Trace_ELBO().loss(model, model.guide, batch) for _ in range(20)) / 20


@pytest.mark.parametrize("name", ["latent SDE, messages", "latent ODE"])
def test_the_same_run_on_a_cpu_gains(name):
    torch.manual_seed(0)
    untrained = trained_loss(MODELS[name])
    assert trained(MODELS[name], "cpu") < untrained - 5


def watched(monkeypatch, program, data, *, device, steps=20, **options):
    """A fit in which torch raises where the host would wait, after the first steps, which are looked at."""
    monkeypatch.setattr(loop, "VALIDATED_STEPS", 2)
    take, first = loop.Trainer.take, 3 if "batch_size" in options else 2

    def taken(trainer, *args, **kwargs):
        done = take(trainer, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype, and says so
            # Until the end of the next step, the taking of its batch included.
            torch.cuda.set_sync_debug_mode(
                "error" if first <= trainer.fit.step < first + steps else "default"
            )
        return done

    monkeypatch.setattr(loop.Trainer, "take", taken)
    torch.manual_seed(0)
    try:
        return sd.fit(*program, data, steps=first + steps, device=device, progress=False, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_gpu(name, monkeypatch):
    make, data, options = CASES[name]
    fit = watched(monkeypatch, make(), data(), device="cuda", **options)
    assert fit.skipped == 0
    assert len(fit.losses) == fit.step > 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_that_looks_is_found():
    """The control, with the model of the counting tests."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(RuntimeError, match="synchroni"):
        watched(monkeypatch, (Normal(lambda call, y: float(y.sum())), no_guide), Y, device="cuda")
