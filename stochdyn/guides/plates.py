"""Tables with a row for every member of the plates around a site, read at the members of a mini-batch."""

from dataclasses import dataclass

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn

from stochdyn.errors import GuideError, ShapeError


@dataclass(frozen=True)
class Place:
    """Where a site stands: its plates, and which members of them this run holds (None: all, in order)."""

    name: str
    frames: tuple[CondIndepStackFrame, ...]
    members: dict[int, Tensor | None]

    @classmethod
    def of(cls, name: str, frames: tuple[CondIndepStackFrame, ...], drawn: dict[str, Tensor]) -> "Place":
        """The place of a site from its message and the subsamples that its plates drew.

        Raises:
            GuideError: if a subsampled plate was made outside the model, so that its members are unknown.
        """
        vectorized = tuple(f for f in frames if f.vectorized)
        members: dict[int, Tensor | None] = {}
        for frame in vectorized:
            whole = frame.full_size is None or frame.size == frame.full_size
            if not whole and frame.name not in drawn:
                raise GuideError(
                    f"site '{name}': plate '{frame.name}' holds {frame.size} of {frame.full_size} members, but was "
                    "made outside the model. Make it inside, e.g. with batch.plate('series')."
                )
            index = drawn.get(frame.name)
            members[frame.dim] = None if index is None or (whole and _in_order(index)) else index
        return cls(name, vectorized, members)

    def table_shape(self, batch_shape: torch.Size) -> torch.Size:
        """The batch shape with every plate at its full size."""
        shape = list(batch_shape)
        for frame in self.frames:
            if -frame.dim <= len(shape):
                shape[frame.dim] = frame.full_size or frame.size
        return torch.Size(shape)

    def check_depth(self, batch_shape: torch.Size) -> None:
        """Refuse a batch with dimensions left of all plates: every draw of one latent would meet every one of another.

        Raises:
            ShapeError: naming the site.
        """
        depth = max((-frame.dim for frame in self.frames), default=0)
        alone = not depth and all(size == 1 for size in batch_shape)  # one series, without a plate
        if len(batch_shape) > depth and not alone:
            raise ShapeError(
                f"site '{self.name}': its batch shape is {tuple(batch_shape)}, and its plates {sorted(self.sizes())} "
                f"have {depth} dimensions. A latent theta is theta[..., None] against the state, and as it is where it "
                "is the start of a path; a batch needs a plate, `with batch.plate('series')`."
            )

    def within(self, other: "Place") -> bool:
        """Whether every plate of this place is around the other one too."""
        return {frame.name for frame in self.frames} <= {frame.name for frame in other.frames}

    def sizes(self) -> dict[str, int]:
        """The whole sizes of the plates, by name."""
        return {frame.name: frame.full_size or frame.size for frame in self.frames}

    def fits(self, table: Tensor, tail: int) -> bool:
        """Whether a table has a row for every member of the whole plates."""
        batch = table.shape[: table.dim() - tail]
        return all(
            -frame.dim > len(batch) or batch[frame.dim] == (frame.full_size or frame.size)
            for frame in self.frames
        )

    def _index(self, table: Tensor, tail: int) -> tuple[Tensor, ...] | None:
        """An index for the batch dimensions of a table, None where it is the whole table."""
        ndim = table.dim() - tail
        if all(index is None or -dim > ndim for dim, index in self.members.items()):
            return None
        out = []
        for axis in range(ndim):
            index = self.members.get(axis - ndim)
            index = (
                torch.arange(table.shape[axis], device=table.device)
                if index is None
                else index.to(table.device)
            )
            out.append(index.reshape(*[1] * axis, -1, *[1] * (ndim - axis - 1)))
        return tuple(out)

    def take(self, table: Tensor, tail: int) -> Tensor:
        """The rows of this run; `tail` is the number of dimensions that are not plates."""
        index = self._index(table, tail)
        return table if index is None else table[index]

    def put(self, table: Tensor, rows: Tensor, tail: int) -> None:
        """Write the rows of this run into a table, in place."""
        index = self._index(table, tail)
        if index is None:
            table.copy_(rows)
        else:
            table[index] = rows


def _in_order(index: Tensor) -> bool:
    return bool((index == torch.arange(len(index), device=index.device)).all())


_taken = nn.ModuleDict()


def key_of(name: str) -> str:
    """A site's name as a key of a ModuleDict, which refuses dots and the names of its own methods."""
    key = name.replace(".", "__")
    return f"{key}__" if hasattr(_taken, key) else key
