"""One exception type per kind of trouble.

Every message has three parts: where and which rule, what was got, and the fix::

    series 3, time 0.7, channel 1: value is NaN. Missing values go into `mask`, not into `values`.
"""


class StochdynError(Exception):
    """The base of every error that the package raises on purpose.

    Example:
        >>> import stochdyn as sd
        >>> try:
        ...     sd.Series([0.0, 1.0], [[[1.0]]])
        ... except sd.StochdynError as error:
        ...     print(type(error).__name__)
        ShapeError
    """


class ShapeError(StochdynError, ValueError):
    """A tensor does not have the promised shape; the message names the dimensions."""


class DtypeError(StochdynError, TypeError):
    """Two tensors that must share a dtype or a device do not."""


class DataError(StochdynError, ValueError):
    """Observed values are unusable: not finite, empty, inconsistent."""


class TimeError(StochdynError, ValueError):
    """Times are unsorted, repeated, not finite, too fine for their magnitude, or a step is not positive."""


class FieldError(StochdynError, ValueError):
    """A drift, diffusion or control returned something unusable, or raised."""


class DiffusionError(FieldError):
    """The diffusion is zero, negative or singular where a density is asked for."""


class StabilityError(FieldError):
    """A drift has no stationary law where one is asked for, or a self-exciting process explodes; with the number."""


class BoundError(FieldError):
    """An intensity is above the bound that thinning was given, so that the draws would be of another law."""


class PaddingError(StochdynError, ValueError):
    """A sequence has more jumps than its padded tensor has rows."""


class JumpError(StochdynError, ArithmeticError):
    """Jumps accumulate at a finite time, or the time of one cannot be located or differentiated."""


class DivergedError(StochdynError, ArithmeticError):
    """A path left the finite numbers; the message gives the first bad time and the last finite state."""


class SupportError(StochdynError, ValueError):
    """A value cannot come from this path, e.g. its known start is another one."""


class GuideError(StochdynError, ValueError):
    """A guide does not fit its model."""


class FitError(StochdynError, RuntimeError):
    """Training cannot go on. `fit` holds the last good state.

    Attributes:
        fit: the `Fit` up to the last good step, or None.
    """

    def __init__(self, message: str, fit: object | None = None) -> None:
        super().__init__(message)
        self.fit = fit
