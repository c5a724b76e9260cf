"""Bad fields, bad values and paths that explode: refused with words, never silently wrong, nothing hangs."""

import math

import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd

F64 = torch.float64
TS = torch.linspace(0, 1, 5, dtype=F64)


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def build(drift=lambda t, z: -z, diffusion=None, initial=None, ts=TS, **more):
    diffusion = tensor(0.5, 0.5) if diffusion is None else diffusion
    initial = tensor(0.1, 0.2) if initial is None else initial
    return sd.SDEPath(drift, diffusion, initial, ts, **more)


def unwritten(t, z):
    raise NotImplementedError("for odd days")


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"drift": lambda t, z: z.new_zeros(3)},
            sd.FieldError,
            r"drift returned shape \(3,\) for z of shape \(2,\)",
        ),
        ({"drift": lambda t, z: z.sum()}, sd.FieldError, "drift must return a tensor that ends in the state"),
        (
            {"drift": lambda t, z: 1.0},
            sd.FieldError,
            "must return a tensor that ends in the state, got float",
        ),
        ({"drift": lambda t, z: z.float()}, sd.DtypeError, "drift returned torch.float32 .* torch.float64"),
        ({"drift": lambda t: t}, sd.FieldError, r"drift failed on t of shape \(1,\), z of shape \(2,\)"),
        ({"drift": lambda t, z: z @ torch.ones(3, 3).double()}, sd.FieldError, "drift failed on"),
        ({"drift": unwritten}, sd.FieldError, "drift raised NotImplementedError: for odd days"),
        ({"drift": 3}, sd.FieldError, "drift must be callable"),
        ({"diffusion": 0.5}, sd.FieldError, r"got 0.5. Write torch.tensor\(\[0.5\]\)"),
        ({"diffusion": torch.ones(3).double()}, sd.FieldError, r"diffusion returned shape \(3,\)"),
        ({"diffusion": torch.ones(2, 3).double()}, sd.FieldError, "For a matrix use sd.MatrixDiffusion"),
        ({"diffusion": torch.ones(2)}, sd.DtypeError, "diffusion returned torch.float32"),
        ({"diffusion": unwritten}, sd.FieldError, "diffusion raised NotImplementedError"),
        (
            {"diffusion": sd.MatrixDiffusion(torch.ones(3, 2).double())},
            sd.FieldError,
            r"expected \(..., state=2, noise\)",
        ),
        (
            {"drift": lambda t, z: z.new_ones(3, 1) * z, "ts": TS.expand(4, 5)},
            sd.FieldError,
            "drift failed on|do not broadcast",
        ),
        ({"solver": "euler"}, sd.FieldError, "must have a transition density, got 'euler'"),
        ({"solver": sd.Heun()}, sd.FieldError, r"as a kernel it is GaussianStep\(mean=Heun\(substeps=1\)\)"),
        (
            {"initial": torch.zeros(2), "drift": lambda t, z: tensor(1.0) * z, "diffusion": torch.ones(2)},
            sd.DtypeError,
            "drift returned torch.float64 on cpu for a state of torch.float32",
        ),
    ],
)
def test_fields_refused_at_once(given, error, message, validate):
    with pytest.raises(error, match=message):
        build(**given, validate_args=validate)


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        (tensor(0.5, 0.0), "time 0, state 1: the diffusion is 0; a density needs it positive"),
        (tensor(-0.5, 0.5), "state 0: the diffusion is -0.5"),
        (tensor(0.5, math.nan), "state 1: the diffusion is nan"),
        (lambda t, z: 0 * z, "state 0: the diffusion is 0"),
        (
            sd.MatrixDiffusion(torch.tensor([[0.1, 0.2], [0.2, 0.4]], dtype=F64)),
            "diffusion matrix is singular",
        ),
        (sd.MatrixDiffusion(torch.zeros(2, 1, dtype=F64)), "diffusion matrix is singular"),
        (sd.MatrixDiffusion(torch.ones(2, 3, dtype=F64)), "diffusion matrix is singular"),
        (sd.MatrixDiffusion(tensor(math.nan, 1.0)[:, None]), "diffusion matrix is not finite"),
    ],
)
def test_diffusions_without_a_density_are_refused_at_once(diffusion, message):
    with pytest.raises(sd.DiffusionError, match=message):
        build(diffusion=diffusion)


def test_a_diffusion_that_vanishes_or_is_not_finite_later():
    z = torch.stack([tensor(0.1, 0.2)] * 5)
    path = build(diffusion=lambda t, z: 0.5 * (t < 0.6) + 0 * z)
    with pytest.raises(sd.DiffusionError, match=r"series 0, time 0.75 \(step 3\): the diffusion is zero"):
        path.log_prob(z)
    path = build(diffusion=lambda t, z: torch.where(t < 0.3, 0.5, torch.nan) + 0 * z)
    with pytest.raises(sd.DiffusionError, match=r"time 0.5 .step 2.: the diffusion is zero or not finite"):
        path.log_prob(z)
    path = build(drift=lambda t, z: torch.where(t < 0.3, 0.5, torch.nan) + 0 * z)
    with pytest.raises(sd.FieldError, match=r"time 0.5 .step 2.: the drift is not finite"):
        path.log_prob(z)
    eye = torch.eye(2, dtype=F64)
    path = build(diffusion=sd.MatrixDiffusion(lambda t, z: torch.where(t[..., None] < 0.6, eye, 0 * eye)))
    with pytest.raises(sd.DiffusionError, match=r"singular|zero"):
        path.log_prob(z)


def test_an_exploding_drift_names_series_time_and_state():
    start = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]], dtype=F64)
    path = build(drift=lambda t, z: z**9, initial=start)
    torch.manual_seed(0)
    with pytest.raises(
        sd.DivergedError,
        match=r"series 1, time \d\.\d+ \(step \d\): the path is not finite; the last state was \[.*e\+",
    ):
        path.rsample()
    own = torch.stack([TS, 2 * TS, 3 * TS])
    with pytest.raises(sd.DivergedError, match=r"series 1, time 1.5 .step 3."):
        build(drift=lambda t, z: z**9, initial=start, ts=own).rsample((4,))
    nested = build(drift=lambda t, z: z**9, initial=start[:, None].expand(3, 2, 2))
    with pytest.raises(sd.DivergedError, match=r"series \(1, 0\), time"):
        nested.rsample()
    quiet = build(drift=lambda t, z: z**9, initial=start, validate_args=False)
    assert not torch.isfinite(quiet.rsample()).all()


@pytest.mark.parametrize("validate", [True, False])
def test_values_of_another_shape_are_refused_in_any_mode(validate):
    path = build(initial=torch.zeros(3, 2, dtype=F64), validate_args=validate)
    z = path.rsample()
    for wrong in (z[:, :2], z[:, :-1], torch.cat([z, z], -2), z[..., :1], z[0, 0]):
        with pytest.raises((sd.ShapeError, ValueError), match=r"must end in"):
            path.log_prob(wrong)
        with pytest.raises((sd.ShapeError, ValueError), match=r"must end in"):
            path.guided().log_prob(wrong)
    with pytest.raises(sd.ShapeError, match=r"value \(2,\), path \(3,\)"):
        path.log_prob(z[:2])


@pytest.mark.parametrize("validate", [True, False])
def test_another_start_is_refused_in_any_mode(validate):
    """NUTS switches validation off: a start that is a latent must not be left behind silently."""
    path = build(validate_args=validate)
    z = path.rsample()
    with pytest.raises(sd.SupportError, match=r"starts up to 0.5 away from the path's known start"):
        path.log_prob(z + 0.5)
    with pytest.raises(sd.SupportError, match=r"starts up to 0.5 away"):
        path.guided().log_prob(z + 0.5)
    z[0] = torch.nan
    with pytest.raises((sd.SupportError, sd.DivergedError), match=r"known start|not finite"):
        path.log_prob(z)


def test_values_of_another_dtype():
    path = build()
    with pytest.raises(sd.DtypeError, match=r"The path is torch.float64, the value torch.float32"):
        path.log_prob(path.rsample().float())


@pytest.mark.parametrize("validate", [True, False])
def test_a_value_that_no_noise_reaches_is_refused(validate):
    path = build(
        drift=lambda t, z: z.flip(-1),
        diffusion=sd.MatrixDiffusion(tensor(0.0, 1.0)[:, None]),
        validate_args=validate,
    )
    z = path.rsample()
    assert torch.isfinite(path.log_prob(z))
    z[3:, 0] += 0.25
    with pytest.raises(
        sd.SupportError, match=r"time 0.5 \(step 2\): the step moves a state that no noise reaches by 0.25"
    ):
        path.log_prob(z)


def test_expand_to_what_does_not_fit():
    with pytest.raises(sd.ShapeError, match=r"batch shape \(3,\) does not expand to \(\)"):
        build(initial=torch.zeros(3, 2, dtype=F64)).expand([])
    with pytest.raises(sd.ShapeError, match=r"path \(3,\), wanted \(4,\)"):
        build(initial=torch.zeros(3, 2, dtype=F64)).expand([4])


def test_a_single_time():
    path = build(initial=dist.Normal(tensor(0.1, 0.2), 1.0).to_event(1), ts=tensor(0.3))
    z = path.rsample((4,))
    assert z.shape == (4, 1, 2)
    assert (path.log_prob(z) - path.chain.start.log_prob(z[:, 0])).abs().max() == 0
    guided = path.guided((torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)), lambda t, z: z)
    assert guided.log_prob(guided.rsample()).shape == ()


def test_one_scale_for_all_states_is_the_same_as_one_for_each():
    one, each = build(diffusion=tensor(0.3)), build(diffusion=tensor(0.3, 0.3))
    torch.manual_seed(0)
    z = each.rsample()
    assert abs(one.log_prob(z) - each.log_prob(z)) < 1e-12
    message = sd.Message(torch.ones(5, 2, dtype=F64), torch.eye(2, dtype=F64).expand(5, 2, 2))
    messages = [sd.information_filter(p, message) for p in (one, each)]
    assert (messages[0].precision - messages[1].precision).abs().max() < 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sign_of_a_noise_does_not_matter(sign):
    path = build(diffusion=sd.MatrixDiffusion(sign * torch.eye(2, dtype=F64)))
    z = torch.stack([tensor(0.1, 0.2)] * 5)
    assert abs(path.log_prob(z) - build(diffusion=tensor(1.0, 1.0)).log_prob(z)) < 1e-12
