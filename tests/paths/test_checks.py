"""Times, contexts and batch shapes that a path refuses, each with words."""

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.paths.checks import check_resolution, check_times, context_by_time, joint_batch

F64 = torch.float64


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def path_on(ts, dtype=F64, **more):
    return sd.SDEPath(
        lambda t, z, *c: -z, torch.tensor([0.5], dtype=dtype), torch.zeros(1, dtype=dtype), ts, **more
    )


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        (tensor(0.0, math.nan, 1.0), "`ts` is nan at position 1. Times must be finite"),
        (tensor(0.0, 1.0, math.inf), "`ts` is inf at position 2"),
        (torch.stack([tensor(0.0, 1.0), tensor(0.0, math.inf)]), "`ts` is inf at series 1, position 1"),
        (tensor(0.0, 1.0, 0.5), "goes back from 1 to 0.5 at position 2. Sort the times"),
        (torch.stack([tensor(0.0, 1.0), tensor(1.0, 0.0)]), "goes back from 1 to 0 at series 1, position 1"),
        (torch.zeros(0), r"at least one time, got \(0,\)"),
        (torch.zeros(0, 3), r"at least one time, got \(0, 3\)"),
        (torch.tensor(1.0), r"at least one time, got \(\)"),
        ([0.0, 1.0], "must be a tensor .* got list. Use TimeGrid"),
        (
            1.7e9 + torch.arange(4.0) * 60,
            "cannot be told apart in torch.float32.*Unix seconds: divide by 86400",
        ),
    ],
)
def test_times_refused(ts, message):
    with pytest.raises(sd.TimeError, match=message):
        path_on(ts)


def test_unix_seconds_are_refused_for_single_precision_states_and_fine_for_double():
    ts = 1.7e9 + torch.arange(4, dtype=F64) * 60
    assert path_on(ts).log_prob(path_on(ts).rsample()).isfinite()
    with pytest.raises(sd.TimeError, match=r"cannot be told apart in torch.float32"):
        path_on(ts, torch.float32)
    with pytest.raises(sd.TimeError, match=r"with steps down to 0.0005 cannot be told apart"):
        path_on(20000 + torch.arange(3, dtype=F64) * 5e-4, torch.float32)


def test_good_times():
    assert check_times(torch.tensor([0, 1, 1]), True).dtype == F64
    check_resolution(tensor(5.0, 5.0), torch.float32)
    check_resolution(torch.linspace(0, 100, 1001), torch.float32, torch.int64)


def test_static_and_timed_contexts():
    assert context_by_time(None, 4, torch.Size([3])) is None
    assert context_by_time(torch.zeros(3, 2), 4, torch.Size([3])).shape == (1, 3, 2)
    assert context_by_time(torch.zeros(3, 4, 2), 4, torch.Size([3])).shape == (4, 3, 2)
    assert context_by_time(torch.zeros(4, 2), 4, torch.Size([])).shape == (4, 2)
    assert context_by_time(torch.zeros(4, 1, 2), 4, torch.Size([4])).shape == (1, 4, 2)
    assert context_by_time(torch.zeros(1, 4, 2), 4, torch.Size([4])).shape == (4, 1, 2)
    assert context_by_time(torch.zeros(4, 4, 2), 4, torch.Size([4])).shape == (4, 4, 2)


def test_a_context_that_may_be_either_is_refused():
    four, ts = torch.zeros(4, 2, dtype=F64), torch.linspace(0, 1, 4, dtype=F64)
    match = r"may be \(time, context_dim\) or \(batch, context_dim\): there are 4 of both"
    with pytest.raises(sd.ShapeError, match=match):
        path_on(ts.expand(4, 4), context=four)
    theta = torch.ones(4, 1, dtype=F64)
    with pytest.raises(sd.ShapeError, match=match):
        sd.SDEPath(lambda t, z, c: -theta * z, tensor(0.5), tensor(0.0), ts, context=four)
    alone = path_on(ts, context=four)
    assert alone.batch_shape == ()
    with pytest.raises(sd.ShapeError, match=match):
        alone.expand([4])
    assert path_on(ts, context=four[:, None]).batch_shape == (4,)
    assert path_on(ts, context=four[None]).expand([4]).batch_shape == (4,)


@pytest.mark.parametrize("validate", [True, False])
def test_contexts_and_batches_that_do_not_fit(validate):
    ts = torch.linspace(0, 1, 4, dtype=F64)
    with pytest.raises(sd.ShapeError, match=r"initial_and_ts \(3,\), context \(2,\)"):
        path_on(ts.expand(3, 4), context=torch.zeros(2, 5, dtype=F64), validate_args=validate)
    with pytest.raises(sd.ShapeError, match=r"initial_and_ts \(3,\), context \(3, 5\)"):
        path_on(ts.expand(3, 4), context=torch.zeros(3, 5, 2, dtype=F64), validate_args=validate)
    with pytest.raises(sd.ShapeError, match=r"`context` must be a tensor of shape .*got float"):
        path_on(ts, context=1.0, validate_args=validate)
    with pytest.raises(sd.ShapeError, match=r"initial \(2,\), ts \(3,\)"):
        sd.SDEPath(
            lambda t, z: -z,
            tensor(0.5),
            torch.zeros(2, 1, dtype=F64),
            ts.expand(3, 4),
            validate_args=validate,
        )


def test_joint_batch():
    assert joint_batch(a=torch.Size([3]), b=torch.Size([2, 1])) == (2, 3)
    with pytest.raises(sd.ShapeError, match=r"a \(3,\), b \(2,\)"):
        joint_batch(a=torch.Size([3]), b=torch.Size([2]))
