"""The encodings of a whole population, of which a run may hold a part.

The posterior of a group reads all its members. In a mini-batch each has the encoding that it had when it was last at
hand before; its message is made from that by the head, with the parameters and the latents of this run. So the
posterior of a group is the same whichever members are at hand, and the mini-batch's ELBO and its gradient are unbiased.
(A posterior made from the members at hand, rescaled, follows the part of the likelihood that is scaled up with it: no
bound. Gradients through the encodings of the members at hand alone do the same to the training, which then diverges.)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stochdyn.data import Series
from stochdyn.device import readable
from stochdyn.errors import GuideError
from stochdyn.guides.signature import same, series_signature


class Summaries(nn.Module):
    """One row per series: its latest encoding, whether there is one, and a checksum of its data.

    Training writes the buffers. In evaluation the rows of the last whole population are kept aside, so that another
    population does not overwrite the one in training.
    """

    rows: Tensor
    known: Tensor
    signature: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self._forget(len(rows))
        self._aside: tuple[Tensor, Tensor] | None = None

    @classmethod
    def begin(cls, population: int, encoding: Tensor) -> "Summaries":
        """An empty one."""
        return cls(encoding.new_zeros(population, encoding.shape[-1]))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "Summaries":
        """An empty one with the shapes of a state_dict."""
        return cls(torch.zeros_like(state["rows"]))

    def _forget(self, population: int) -> None:
        device = self.rows.device
        self.register_buffer("known", torch.zeros(population, dtype=torch.bool, device=device))
        self.register_buffer("signature", torch.zeros(population, dtype=torch.float64, device=device))

    def whole(self, batch: Series, encoding: Tensor) -> Tensor:
        """The encodings of the population (population, hidden): attached if it is at hand as a whole, else stored ones.

        Raises:
            GuideError: if one is not at hand and never was.
        """
        signature, position = series_signature(batch), _positions(batch)
        absent = position < 0
        part = bool(absent.any()) if readable(absent) else len(batch) < batch.population
        stored = self._stored(batch, encoding, signature) if part else None
        if part and stored is None:
            raise GuideError(
                f"This run holds {len(batch)} of {batch.population} series, and the posterior of a group reads all its "
                f"members: {int(absent.sum())} of the others have no encoding yet. Call the guide once on the whole "
                "data, guide(series), before it runs on mini-batches."
            )
        self._write(batch, encoding.detach(), signature, whole=stored is None)
        return encoding[position] if stored is None else stored.to(encoding)

    def _stored(self, batch: Series, encoding: Tensor, signature: Tensor) -> Tensor | None:
        """Rows of the batch's own population, told by its size and the data at hand."""
        candidates = [(self.rows, self.signature, self.known)]
        if self._aside is not None and not self.training:
            candidates.insert(0, (*self._aside, torch.ones_like(self._aside[1], dtype=torch.bool)))
        for rows, checksums, known in candidates:
            if len(rows) != batch.population:
                continue
            at_hand = torch.zeros_like(known)
            at_hand[batch.index] = True
            own = same(checksums[batch.index], signature) | ~known[batch.index]
            whole = (known | at_hand).all() & known.any() & own.all()
            fresh = encoding.detach()[_positions(batch).clamp(min=0)].to(rows)
            filled = torch.where(known[:, None], rows, fresh)
            if not readable(whole):
                return torch.where(whole, filled, torch.nan)
            if whole:
                return filled
        return None

    def _write(self, batch: Series, encoding: Tensor, signature: Tensor, whole: bool) -> None:
        if not self.training:
            if whole:
                order = _positions(batch)
                self._aside = encoding[order], signature[order]
            return
        if batch.population != len(self.rows):
            self.rows = encoding.new_zeros(batch.population, encoding.shape[-1])
            self._forget(batch.population)
        self.rows[batch.index] = encoding.to(self.rows)
        self.signature[batch.index] = signature.to(self.signature)
        self.known[batch.index] = True


def _positions(batch: Series) -> Tensor:
    """(population,) where each series stands in the batch, -1 where it does not."""
    position = torch.full((batch.population,), -1, device=batch.index.device)
    position[batch.index] = torch.arange(len(batch), device=batch.index.device)
    return position
