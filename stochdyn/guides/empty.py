"""The guide of a model without latents."""

from itertools import count
from typing import Any

from torch import nn

from stochdyn.guides.passes import emit_parameters

_serial = count()


class EmptyGuide(nn.Module):
    """Samples nothing: the loss is then the negative log likelihood. It has Pyro's own `SVI` train the model.

    Args:
        model: a module without latents. Held outside the module tree: its parameters are the model's own.

    Example:
        >>> import torch
        >>> guide = EmptyGuide(torch.nn.Linear(2, 1))
        >>> guide(None), list(guide.parameters())
        (None, [])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)
        self._label = f"EmptyGuide${next(_serial)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._label = f"EmptyGuide${next(_serial)}"

    @property
    def model(self) -> nn.Module:
        """The model that the guide was made for."""
        return self._model[0]

    def forward(self, *args: Any, **kwargs: Any) -> None:
        emit_parameters(self.model, self._label)
