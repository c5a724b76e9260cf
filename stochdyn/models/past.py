"""What the observations of every series said by any time: states, and draws that go on from them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stochdyn.data import Series
from stochdyn.data.checks import show_time
from stochdyn.data.ragged import knots_of
from stochdyn.device import readable
from stochdyn.errors import TimeError
from stochdyn.fields import Memory
from stochdyn.paths.observation_jumps import ObservationJumps, Predict, Readings, State, Trail


@dataclass(frozen=True)
class Past:
    """A run through the times at which something was observed; all other times are reached from the one before.

    So times without observations change nothing, and cost no step of the loop.

    Attributes:
        batch: the series.
        jumps, predict: what the state does, and the distribution that is read off it.
        readings: at all times of the batch.
        rows: those of them that the loop goes through: the first, the observed, and where a covariate was given.
        row: (series, time) the last such row until each time.
        holes: (series, time) real times that are no such row.
        trail: the states at the rows.
    """

    batch: Series
    jumps: ObservationJumps
    predict: Predict
    readings: Readings
    rows: Readings
    row: Tensor
    holes: Tensor
    trail: Trail

    @classmethod
    def of(
        cls, batch: Series, jumps: ObservationJumps, predict: Predict, start: Tensor, *, with_covariates: bool
    ) -> "Past":
        """Run through a batch from the states `start` (series, hidden) at its first times."""
        readings = _read(batch, start.dtype, with_covariates)
        kept = (readings.mask != 0).any(-1)
        kept[:, 0] = True
        if with_covariates and batch.covariates is not None and batch.covariates.dim() == 3:
            kept = kept | knots_of(batch).any(-1)
        real = torch.arange(kept.shape[1], device=kept.device) < batch.lengths[:, None]
        rows = _compact(readings, kept)
        trail = jumps.run(start, rows, predict)
        return cls(batch, jumps, predict, readings, rows, kept.cumsum(1) - 1, real & ~kept, trail)

    def before(self) -> State:
        """Just before each time of the batch (series, time, ...).

        Where nothing was observed no likelihood depends on it: it has no gradient there, and inside a fit on an
        accelerator, where holes may not be looked for, it is left at that of the row before.
        """
        state = self._picked(self.trail.before, self.trail.memory_before)
        if not readable(self.holes) or not bool(self.holes.any()):
            return state
        i, k = torch.where(self.holes)
        with torch.no_grad():
            h, memory = self._from_row(i, self.row[i, k], self.readings.times[i, k])

        def filled(x: Tensor, new: Tensor) -> Tensor:
            return x.index_put((i, k), new)

        return filled(state[0], h), state[1].apply(filled, memory)

    def until(self, ts: Tensor) -> State:
        """Given all observations until ts (series, k), then included: (series, k, ...).

        Raises:
            TimeError: naming series and time, if one is before the first.
        """
        row = torch.searchsorted(self.rows.times.contiguous(), ts.contiguous(), right=True) - 1
        self._check(ts, row)
        i = torch.arange(len(ts), device=ts.device)[:, None].expand(row.shape)
        h, memory = self._from_row(i.flatten(), row.clamp_min(0).flatten(), ts.flatten())
        return h.unflatten(0, row.shape), memory.apply(lambda x: x.unflatten(0, row.shape))

    def draw(self, n: int) -> Tensor:
        """(n, series, time, channel) draws at the times of the batch: what is drawn is fed back until the next
        observation."""
        mask = self.readings.mask
        observed = (mask != 0).any(-1)
        with torch.no_grad():
            y = self.predict(*self.before()).sample((n,))
            after = self._picked(self.trail.after, self.trail.memory_after)
            beside = (mask == 0) & observed[..., None]
            if bool(beside.any()):
                y = torch.where(beside, self.predict(*after).sample((n,)), y)
            padding = torch.arange(mask.shape[1], device=mask.device) >= self.batch.lengths[:, None]
            return self._fed_back(y, observed | padding, after)

    def _fed_back(self, y: Tensor, fixed: Tensor, after: State) -> Tensor:
        """Draw what is not fixed one after the other, from the state after the last that is."""
        n, rows = len(y), self.readings

        def spread(x: Tensor, k: int) -> Tensor:
            """(draw and series, ...) row k."""
            return x[:, k].expand(n, *x[:, k].shape).flatten(0, 1)

        def known(state: State, k: int) -> State:
            return spread(state[0], k), state[1].apply(lambda x: spread(x, k))

        out, state = list(y.unbind(2)), known((self.trail.before, self.trail.memory_before), 0)
        times = rows.times[..., None]
        for k in range(len(out)):
            if bool(fixed[:, k].all()):
                state = None  # it is known, and found where it is needed
                continue
            state = known(after, k - 1) if state is None else state
            context = () if rows.context is None else (spread(rows.context, k),)
            if k:
                acting = None if rows.context is None else spread(rows.context, k - 1)
                t = spread(times, k - 1)
                state = self.jumps.between(t, spread(times, k) - t, *state, acting)
            here, free = out[k].flatten(0, 1), ~spread(fixed[..., None], k)
            value = torch.where(free, self.predict(*state).sample().to(here.dtype), here)
            reading = (value.to(state[0].dtype), torch.ones_like(state[1].seen), *context)
            jumped = self.jumps.jumped(spread(times, k), *state, reading, self.predict)
            state = _where(free, jumped, known(after, k))
            out[k] = value.unflatten(0, (n, -1))
        return torch.stack(out, 2)

    def _picked(self, states: Tensor, memory: Memory) -> State:
        """Of the last row until each time of the batch."""

        def pick(x: Tensor) -> Tensor:
            return x.gather(1, self.row[..., None].expand(*self.row.shape, x.shape[-1]))

        return pick(states), memory.apply(pick)

    def _from_row(self, i: Tensor, row: Tensor, ts: Tensor) -> State:
        """For series i (n,), from their rows (n,) to times ts (n,)."""
        t = self.rows.times[i, row]
        context = None if self.rows.context is None else self.rows.context[i, row]
        h, memory = self.trail.after[i, row], self.trail.memory_after.apply(lambda x: x[i, row])
        return self.jumps.between(t[:, None], (ts - t)[:, None], h, memory, context, who=i)

    def _check(self, ts: Tensor, row: Tensor) -> None:
        bad = (row < 0) | ~ts.isfinite()
        if readable(bad) and bool(bad.any()):
            i, k = bad.nonzero()[0].tolist()
            first = show_time(self.rows.times[i, 0])
            raise TimeError(
                f"series {self.batch.ids[i]}: `ts` has time {show_time(ts[i, k])}, and the series starts at {first}. "
                "Ask for finite times from there on, or begin it earlier: batch.extend([an earlier time])."
            )


def _read(batch: Series, dtype: torch.dtype, with_covariates: bool) -> Readings:
    observed = batch.mask.to(dtype)
    mask = observed if batch.low is None else torch.where(batch.censored, -observed, observed)
    values = torch.where(batch.mask, batch.values, torch.zeros_like(batch.values)).to(dtype)
    context = batch.covariates.to(dtype) if with_covariates and batch.covariates is not None else None
    if context is not None and context.dim() == 2:
        context = context[:, None].expand(-1, values.shape[1], -1)
    return Readings(batch.times.expand(len(batch), -1), values, mask, context)


def _compact(readings: Readings, kept: Tensor) -> Readings:
    """The rows kept, in order; after them the last one again, at which nothing is observed."""
    if readable(kept) and bool(kept.all()):
        return readings
    points = kept.shape[1]
    position = torch.arange(points, device=kept.device).expand_as(kept)
    order = torch.where(kept, position, torch.full_like(position, points)).sort(1).values
    order = order[:, : int(kept.sum(1).max())] if readable(kept) else order
    real = order < points
    last = torch.where(kept, position, torch.zeros_like(position)).amax(1, keepdim=True)
    order = torch.where(real, order, last)
    rows = readings.apply(lambda x: x.gather(1, order[..., None].expand(*order.shape, x.shape[-1])))
    return replace(rows, mask=rows.mask * real[..., None])


def _where(which: Tensor, here: State, there: State) -> State:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(which, a, b)

    return choose(here[0], there[0]), here[1].apply(choose, there[1])
