"""The path KL: its value against Girsanov's, its expectation against the log ratio, and what is refused."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import stochdyn as sd
from tests import problems
from tests.problems import within

F64 = torch.float64


def tensor(*x):
    return torch.tensor(x, dtype=F64)


class TestKL:
    def paths(self, a, c, ts):
        return [
            sd.SDEPath(lambda t, z, rate=rate: -rate * z, tensor(0.5), tensor(1.0), ts) for rate in (a, c)
        ]

    def test_ornstein_uhlenbeck_against_girsanov(self):
        q, p = self.paths(1.0, 2.0, torch.linspace(0, 2, 201, dtype=F64))
        torch.manual_seed(0)
        with torch.no_grad():
            q = q.expand([20000])
            q.rsample()
            kl = kl_divergence(q, p)
        answer = problems.ou_path_kl(1.0, 2.0, 0.5, 2.0, 1.0)
        assert answer == pytest.approx(1.3589738159723574, abs=1e-12)
        se = float(kl.std() / math.sqrt(20000))
        assert abs(kl.mean() - answer) < 0.01 * answer + 2 * se
        assert not abs(kl.mean() - problems.ou_path_kl(1.0, 2.1, 0.5, 2.0, 1.0)) < 0.01 * answer + 2 * se

    @pytest.mark.parametrize("kind", ["message", "control", "matrix", "start"])
    def test_guided_against_prior_has_the_expectation_of_the_log_ratio(self, kind):
        ts = tensor(0.0, 0.1, 0.35, 0.4, 1.0)
        noise = sd.MatrixDiffusion(torch.tensor([[0.5, 0.1], [0.2, 0.6]], dtype=F64))
        start = (
            dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1) if kind == "start" else tensor(0.3, 0.1)
        )
        p = sd.SDEPath(lambda t, z: -z.sin(), noise if kind == "matrix" else tensor(0.4, 0.5), start, ts)
        message = sd.Message.at(
            torch.ones(5, 2, dtype=F64), 2 * torch.eye(2, dtype=F64).expand(5, 2, 2) + 0.5
        )
        control = (lambda t, z: z.cos()) if kind in ("control", "matrix") else None
        q = p.guided(None if kind == "control" else message, control).expand([20000])
        torch.manual_seed(0)
        with torch.no_grad():
            z = q.rsample()
            kl, ratio = kl_divergence(q, p), q.log_prob(z) - p.log_prob(z)
        assert within(kl - ratio, 0.0)
        assert kl.std() < ratio.std()
        assert not within(kl - ratio, 0.05 * float(ratio.mean()))

    def test_without_a_draw_or_on_another_grid(self):
        q, p = self.paths(1.0, 2.0, torch.linspace(0, 2, 5, dtype=F64))
        with pytest.raises(NotImplementedError, match=r"call rsample first"):
            kl_divergence(q, p)
        q.rsample()
        _, other = self.paths(1.0, 2.0, torch.linspace(0, 3, 5, dtype=F64))
        with pytest.raises(sd.SupportError, match=r"different grids"):
            kl_divergence(q, other)
        random = sd.SDEPath(lambda t, z: -z, tensor(0.5), dist.Normal(tensor(0.0), 1.0).to_event(1), q.ts)
        with pytest.raises(sd.SupportError, match=r"known start and one with a random start"):
            kl_divergence(q, random)

    def test_zero_for_the_same_path_and_infinite_where_no_noise_reaches(self):
        g = sd.MatrixDiffusion(tensor(0.0, 0.5)[:, None])
        ts = torch.linspace(0, 1, 5, dtype=F64)
        q = sd.SDEPath(lambda t, z: z.flip(-1), g, tensor(0.3, 0.1), ts)
        q.rsample()
        assert abs(kl_divergence(q, q)) < 1e-12
        p = sd.SDEPath(lambda t, z: z.flip(-1) * tensor(1.5, 1.0), g, tensor(0.3, 0.1), ts)
        with pytest.raises(sd.SupportError, match=r"no noise reaches"):
            kl_divergence(q, p)
