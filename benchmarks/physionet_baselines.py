"""Plain interpolation, one channel at a time: mean, last value, straight lines, and a Gaussian process."""

from dataclasses import dataclass

import torch
from physionet_data import Stays
from torch import Tensor, nn

STAYS = 400  # that the hyperparameters of a Gaussian process are fitted to, at most
ITERATIONS = 60  # of LBFGS


def errors(predicted: Tensor, stays: Stays) -> tuple[Tensor, Tensor]:
    """(channel,) the sums of squared errors over what is held out, and how many there are."""
    square = (predicted - stays.truth).square() * stays.held
    return square.sum((0, 1)).double(), stays.held.sum((0, 1)).double()


def means(stays: Stays) -> Tensor:
    """(channel,) over everything."""
    y = stays.everything
    return (y.values * y.mask).sum((0, 1)) / y.mask.sum((0, 1)).clamp(min=1)


def neighbours(stays: Stays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every time and channel the last shown value and its time, the next one and its; NaN where there is none."""
    y, mask = stays.shown.values, stays.shown.mask
    times = stays.shown.times.to(y)[..., None].expand_as(y)
    before = torch.where(mask, torch.arange(y.shape[1])[:, None], -1).cummax(1).values
    after = torch.where(mask, torch.arange(y.shape[1])[:, None], y.shape[1]).flip(1).cummin(1).values.flip(1)
    found = []
    for at, there in ((before, before >= 0), (after, after < y.shape[1])):
        index = at.clamp(0, y.shape[1] - 1)
        found += [x.gather(1, index).masked_fill(~there, torch.nan) for x in (y, times)]
    return found[0], found[1], found[2], found[3]


def last(stays: Stays) -> Tensor:
    """The last shown value; NaN where there is none."""
    return neighbours(stays)[0]


def straight(stays: Stays) -> Tensor:
    """A straight line from the last to the next shown value; level before the first and after the last."""
    before, since, after, until = neighbours(stays)
    now = stays.shown.times.to(before)[..., None]
    share = ((now - since) / (until - since).clamp(min=1e-9)).clamp(0, 1)
    inner = before + share * (after - before)
    return torch.where(before.isnan(), after, torch.where(after.isnan(), before, inner))


@dataclass(frozen=True)
class Shrunk:
    """mean + weight (guess - mean), the weight of every channel by least squares; the mean where there is no guess."""

    mean: Tensor
    weight: Tensor

    @classmethod
    def fitted(cls, guess: Tensor, stays: Stays) -> "Shrunk":
        mean = means(stays)
        use = stays.held & guess.isfinite()
        x, y = (torch.where(use, v - mean, 0.0) for v in (guess, stays.truth))
        return cls(mean, (x * y).sum((0, 1)) / x.square().sum((0, 1)).clamp(min=1e-12))

    def __call__(self, guess: Tensor) -> Tensor:
        return self.mean + self.weight * torch.where(guess.isfinite(), guess - self.mean, 0.0)


class Process(nn.Module):
    """y = mean + level of the stay + Ornstein-Uhlenbeck + noise, the four sizes and the rate of one channel."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean).double())
        self.log_scales = nn.Parameter(torch.tensor([0.7, 0.6, 0.4]).double().mul(spread).log())
        self.log_rate = nn.Parameter(torch.zeros(()).double())

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        level, ou, _ = self.log_scales.mul(2).exp()
        return level + ou * torch.exp(-self.log_rate.exp() * (a[:, :, None] - b[:, None]).abs())

    def factor(self, times: Tensor, there: Tensor) -> Tensor:
        k = self.covariance(times, times) * (there[:, :, None] & there[:, None])
        noise = torch.where(there, self.log_scales[2].mul(2).exp() + 1e-10, 1.0)
        return torch.linalg.cholesky(k + torch.diag_embed(noise))

    def loss(self, times: Tensor, y: Tensor, there: Tensor) -> Tensor:
        chol = self.factor(times, there)
        rest = ((y - self.mean) * there)[..., None]
        white = torch.linalg.solve_triangular(chol, rest, upper=False)
        return (0.5 * white.square().sum() + chol.diagonal(dim1=-2, dim2=-1).log().sum()) / there.sum()

    def fit(self, times: Tensor, y: Tensor, there: Tensor) -> "Process":
        optimiser = torch.optim.LBFGS(self.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(times, y, there)
            loss.backward()
            return loss

        optimiser.step(closure)
        return self

    @torch.no_grad()
    def predict(self, times: Tensor, y: Tensor, there: Tensor, at: Tensor) -> Tensor:
        rest = ((y - self.mean) * there)[..., None]
        weights = torch.cholesky_solve(rest, self.factor(times, there))
        cross = self.covariance(at, times) * there[:, None]
        return self.mean + (cross @ weights)[..., 0]


def packed(stays: Stays, channel: int) -> tuple[Tensor, Tensor, Tensor]:
    """(stay, n) times, values and where they are, of the shown observations of a channel."""
    mask = stays.shown.mask[..., channel]
    order = (
        mask.double().sort(dim=1, descending=True, stable=True).indices[:, : max(int(mask.sum(1).max()), 1)]
    )
    picked = (stays.shown.times, stays.shown.values[..., channel].double(), mask)
    times, y, there = (x.gather(1, order) for x in picked)
    return times, y, there


def fitted(stays: Stays, most: int | None = None) -> list[Process]:
    """One Gaussian process per channel, by maximum likelihood on what is shown of up to `most` training stays."""
    found = []
    for channel in range(stays.truth.shape[-1]):
        times, y, there = packed(stays, channel)
        some = there.any(1).nonzero()[: most or STAYS, 0]
        values = y[there]
        spread = float(values.std()) if len(values) > 1 else 0.0
        process = Process(float(values.mean()) if len(values) else 0.0, max(spread, 1e-3))
        if spread > 1e-6:
            process.fit(times[some], y[some], there[some])
        found.append(process)
    return found


def smoothed(processes: list[Process], stays: Stays) -> Tensor:
    """(stay, time, channel) the conditional mean given what is shown of each channel."""
    out = torch.zeros_like(stays.truth)
    for channel, process in enumerate(processes):
        out[..., channel] = process.predict(*packed(stays, channel), stays.shown.times).to(out)
    return out


def plain(train: Stays, test: Stays) -> dict[str, Tensor]:
    """Predictions by name, without the Gaussian process."""
    found = {"mean": means(train).expand_as(test.truth)}
    for name, guess in (("last", last), ("straight", straight)):
        found[name] = Shrunk.fitted(guess(train), train)(guess(test))
    return found
