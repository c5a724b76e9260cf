"""Guiding by marginals: simulation-free with `PathELBO`, by messages made of the same marginals elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.device import cholesky, readable
from stochdyn.encoders import AbstractEncoder
from stochdyn.errors import GuideError
from stochdyn.guides.messages import AbstractPathFamily
from stochdyn.guides.passes import Run
from stochdyn.guides.path_site import prior_scale
from stochdyn.guides.plates import Place
from stochdyn.guides.signature import same, series_signature
from stochdyn.guides.upstream import beside, series_around
from stochdyn.paths import GuidedPath, MarginalPath, SDEPath
from stochdyn.paths.marginal import Knots


@dataclass(frozen=True)
class Marginals(AbstractPathFamily):
    """The posterior of a path by its marginals: trained without a solver by `objective=sd.PathELBO()`.

    A mean and a full covariance at every time with an observation, and a bridge between each two, see `MarginalPath`.
    The same guide, trained, also draws paths on the model's grid: with any other objective, and in `predict`,
    `evidence` and the like, it is a path guided by messages.

    Args:
        init_scale: initial standard deviations, as a share of the prior's.

    References:
        Bartosh, Vetrov & Naesseth, "SDE Matching", 2025, https://arxiv.org/abs/2502.02472

    Example:
        >>> import torch, stochdyn as sd
        >>> batch = sd.Series(torch.linspace(0, 1, 6), torch.randn(8, 6, 3))
        >>> model = sd.LatentSDE(3, 2, hidden=16, paths=sd.Marginals())
        >>> fit = sd.fit(model, model.guide, batch, objective=sd.PathELBO(), steps=5, progress=False)
        >>> sd.predict(fit, batch, draws=10).states.shape
        torch.Size([10, 8, 6, 2])
    """

    init_scale: float = 0.3


class KnotsOnly(Messenger):
    """While it is active, guides give the values at the observation times and no more: `PathELBO` uses it.

    Args:
        sampled: what to sample in place of the marginals themselves.
    """

    def __init__(self, sampled: Callable[[MarginalPath], MarginalPath] = lambda marginal: marginal) -> None:
        super().__init__()
        self.sampled = sampled


class MarginalSite(nn.Module):
    """What a guide learns for one path site: tables of numbers per series, or networks that read an encoding.

    An encoder sees what follows; a second pass, forward over its encodings, adds what went before.
    """

    centre: Tensor
    unit: Tensor
    signature: Tensor

    def __init__(
        self, state: int, tables: tuple[Tensor, Tensor] | None, sizes: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        self._most = 0  # knots per series, in the data met so far
        self.state, self.sizes = state, sizes
        per_knot, per_gap = numbers(state)
        if tables is not None:
            self.knot_numbers, self.gap_numbers = (nn.Parameter(t) for t in tables)
        elif sizes is not None:
            encoded, upstream, hidden = sizes
            before = max(hidden // 2, 8)
            self.forwards = Forwards(encoded, before)
            self.trunk = nn.Linear(before + encoded + upstream, hidden)
            self.knot_head, self.gap_head = nn.Linear(hidden, per_knot), nn.Linear(hidden, 2 * per_gap)
            self.gap_weight = nn.Parameter(torch.zeros(per_gap))
        self.register_buffer("centre", torch.zeros(state))
        self.register_buffer("unit", torch.ones(state))
        shape = tables[0].shape[:-2] if tables is not None else (0,)
        self.register_buffer("signature", torch.full(shape, torch.nan, dtype=torch.float64))

    def _like(self, like: Tensor) -> "MarginalSite":
        """On its device and in its dtype, but for the checksums, which need all their digits."""
        signature = self.signature.to(like.device)
        self.to(like)
        self.signature = signature
        return self

    @classmethod
    def begin(
        cls, family: Marginals, prior: SDEPath, place: Place, run: Run, sizes: tuple[int, int, int] | None
    ) -> "MarginalSite":
        """A new one; `sizes` are those of encoding, latents sampled before, and hidden layers, None without encoder."""
        like, state = prior.chain.start.centre().detach(), prior.chain.state_dim
        tables = None
        if sizes is None:
            shape = place.table_shape(prior.batch_shape)
            knots = knots_of(series_around(place, run.args), prior)[0].shape[-1]
            counts = zip((knots, knots - 1), numbers(state), strict=True)
            tables = tuple(like.new_zeros(*shape, points, count) for points, count in counts)
        new = cls(state, tables, sizes)._like(like)  # type: ignore
        new.centre, new.unit = prior_scale(prior)
        new._start(family.init_scale)
        return new

    @torch.no_grad()
    def _start(self, scale: float) -> None:
        log_scale = torch.tensor(scale).log()
        if self.sizes is None:
            self.knot_numbers[..., self.state : 2 * self.state] = log_scale
        else:
            for head in (self.knot_head, self.gap_head):
                head.weight.mul_(0.1)
                head.bias.zero_()
            self.knot_head.bias[self.state : 2 * self.state] = log_scale

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "MarginalSite":
        """An empty one with the shapes of a state_dict."""
        size, like = len(state["centre"]), state["centre"]
        if "knot_numbers" in state:
            tables = torch.zeros_like(state["knot_numbers"]), torch.zeros_like(state["gap_numbers"])
            return cls(size, tables, None)._like(like)
        twice, encoded = state["forwards.inputs.weight"].shape
        before = twice // 2
        hidden, inputs = state["trunk.weight"].shape
        upstream = inputs - before - encoded
        return cls(size, None, (encoded, upstream, hidden))._like(like)

    def marginal(
        self, encoder: AbstractEncoder | None, prior: SDEPath, place: Place, run: Run
    ) -> MarginalPath:
        """The posterior of this run.

        Raises:
            GuideError: without a `Series`, or (without an encoder) for data that it was not trained on.
        """
        batch = series_around(place, run.args)
        times, index, observed = knots_of(batch, prior, self._most)
        if readable(times):
            self._most = max(self._most, times.shape[-1])
        if encoder is None:
            knot, gap = self._rows(batch, place, times.shape[-1])
        else:
            knot, gap = self._encoded(run.encoded(encoder), times, index, run.upstream(place))
        return MarginalPath(prior, self._knots(times, knot, gap), observed)

    def _knots(self, times: Tensor, knot: Tensor, gap: Tensor) -> Knots:
        n, unit = self.state, self.unit
        i, j = torch.tril_indices(n, n, -1, device=knot.device)
        L = torch.diag_embed(knot[..., n : 2 * n].exp())
        L[..., i, j] = knot[..., 2 * n :]
        slopes = gap[..., : 2 * n].unflatten(-1, (2, n)) * unit
        M = gap[..., 2 * n :].unflatten(-1, (n, n))
        coupling = torch.linalg.solve_triangular(
            cholesky(M @ M.mT + torch.eye(n, dtype=M.dtype, device=M.device)), M, upper=False
        )
        return Knots(times, self.centre + unit * knot[..., :n], unit[:, None] * L, slopes, coupling)

    def _rows(self, batch: Series, place: Place, points: int) -> tuple[Tensor, Tensor]:
        knot, gap = place.take(self.knot_numbers, 2), place.take(self.gap_numbers, 2)
        stored, found = place.take(self.signature, 0), series_signature(batch).to(self.signature.device)
        own = (same(stored, found) | stored.isnan()).all()
        if not readable(own):
            return torch.where(own, knot, torch.nan)[..., :points, :], gap[..., : points - 1, :]
        if self.training and bool(stored.isnan().any()):
            place.put(self.signature, found, 0)
            own = torch.ones_like(own)
        if points > knot.shape[-2] or not bool(own):
            raise GuideError(
                f"path site '{place.name}': a guide without an encoder knows only the series that it was trained on, "
                "and these are other data (or it first ran on a part of them: call it once on all). Use "
                "encoder=sd.GRUEncoder(...), or fit a new guide."
            )
        return knot[..., :points, :], gap[..., : points - 1, :]

    def _encoded(
        self, encoding: Tensor, times: Tensor, index: Tensor, upstream: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        code = _picked(encoding.to(self.unit), index)
        gaps = times.diff(dim=-1)[..., None].to(code)
        before = self.forwards(code, nn.functional.pad(gaps, (0, 0, 1, 0)))
        both = torch.cat([before, code], -1)
        both = beside(both, *[v[..., None, :] for v in upstream])
        trunk = torch.tanh(self.trunk(both))
        left, right = self.gap_head(trunk).chunk(2, -1)  # of the gap after, and of the gap before
        return self.knot_head(trunk), left[..., :-1, :] + right[..., 1:, :] + gaps * self.gap_weight


class Forwards(nn.Module):
    """What went before every knot: a gated average of candidates, both linear in the encoding.

    h = (1 - g) h + g c with g = sigmoid(U e + u gap) and c = W e. No product of matrices runs along time, so it costs a
    fraction of a GRU; the encoder, and the layer after, are not linear.

    References:
        Feng et al., "Were RNNs all we needed?", 2024, https://arxiv.org/abs/2410.01201
    """

    def __init__(self, encoded: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(encoded, 2 * hidden)
        self.gap_weight = nn.Parameter(torch.zeros(hidden))

    def forward(self, code: Tensor, gaps: Tensor) -> Tensor:
        """(series, knot, encoded) and the gaps before them (series, knot, 1) to (series, knot, hidden)."""
        candidate, gate = self.inputs(code).chunk(2, -1)
        gate = torch.sigmoid(gate + gaps * self.gap_weight)
        h, out = torch.zeros_like(candidate[:, 0]), []
        for c, g in zip(candidate.unbind(1), gate.unbind(1), strict=True):
            h = torch.lerp(h, c, g)
            out.append(h)
        return torch.stack(out, 1)


def _picked(encoding: Tensor, index: Tensor) -> Tensor:
    """The rows (series, knot) of an encoding (series, time, ...)."""
    points = index.shape[1]
    if points == encoding.shape[1] and readable(index):
        in_order = index == torch.arange(points, device=index.device)
        if bool(in_order.all()):
            return encoding  # every time is a knot: no copy
    return encoding.gather(1, index[..., None].expand(*index.shape, encoding.shape[-1]))


def numbers(state: int) -> tuple[int, int]:
    """How many numbers a knot and a gap take."""
    return 2 * state + state * (state - 1) // 2, 2 * state + state * state


def knots_of(batch: Series, prior: SDEPath, most: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Where the knots are: the path's first time, and the times at which something is observed.

    A series whose first observation is at its path's first time has one knot there, whatever the other series have:
    with two at one time the start would be charged at the first, and the likelihood read off the second.

    Args:
        batch: the series.
        prior: the path.
        most: knots of the series with most of them, 0 if that is not known: there are that many where numbers may not
            be looked at.

    Returns:
        times (series, knot), padded by repeats of the last; the position of each in the batch's times; for every time
        of the batch the knot whose value stands there (where nothing is observed, the next one's).
    """
    seen = batch.mask.any(-1)
    count = seen.sum(-1).clamp(min=1)
    order = torch.argsort((~seen).to(torch.int8), dim=-1, stable=True)
    own = batch.times.expand(len(batch), -1)
    first = prior.ts.expand(len(batch), -1)[:, :1].to(own.device)
    early = (first < own.gather(1, order[:, :1])).to(torch.int64)
    columns = max(int((count + early[:, 0]).max()), 2) if readable(count) else most or seen.shape[1] + 1
    places = torch.arange(columns, device=seen.device) - early
    places = torch.minimum(places.clamp(min=0), count[:, None] - 1)
    index = order.gather(1, places)
    times = own.gather(1, index)
    times = torch.cat([torch.where(early > 0, first, times[:, :1]), times[:, 1:]], -1)
    following = seen.cumsum(-1) - seen.to(torch.int64)
    return times, index, torch.minimum(following, count[:, None] - 1) + early


def in_use(marginal: MarginalPath) -> GuidedPath | MarginalPath:
    """The marginals themselves inside a `KnotsOnly`, else the path on the grid that they guide."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, KnotsOnly):
            return handler.sampled(marginal)
    return marginal.guided()
