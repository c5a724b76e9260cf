"""What `diagnose` returns: the numbers, a verdict on each, and a table."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from stochdyn.diagnostics.coverage import LEVELS, Coverage
from stochdyn.diagnostics.importance import ParetoK
from stochdyn.diagnostics.rescaling import TimeRescaling
from stochdyn.diagnostics.settling import Settling
from stochdyn.diagnostics.weights import Estimate

Level = Literal["good", "fair", "bad", "-"]


@dataclass(frozen=True)
class Verdict:
    """One line of a diagnosis.

    Attributes:
        check: what was looked at.
        level: "good", "fair" (usable, with the reservation that is named), "bad", or "-" for not measured.
        found: the finding, in words.
        advice: what to do; empty where there is nothing to do.

    Example:
        >>> print(Verdict("k-hat", "bad", "k-hat 0.92", "Use a richer guide."))
        bad   k-hat     k-hat 0.92
                        -> Use a richer guide.
    """

    check: str
    level: Level
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<5} {self.check:<9} {self.found}"
        return f"{line}\n{'':<15} -> {self.advice}" if self.advice else line


@dataclass(frozen=True)
class LatentUse:
    """How far the posterior of one latent has moved from its prior, in unconstrained coordinates.

    Attributes:
        name: of the site.
        local: whether it has a member for each series.
        posterior_sd: (member, unit).
        prior_sd: likewise, of draws from the model; NaN where these failed.
        units: numbers per member.
        active: how many of these have posterior means that differ between series; None for a latent that is shared.
        kl: the mean of log q - log p given the latents before it, per series for a local one, else in all.

    Example:
        >>> LatentUse("theta", False, np.array([[0.1]]), np.array([[0.5]]), 1, None, 1.2).ratio
        0.2
    """

    name: str
    local: bool
    posterior_sd: np.ndarray
    prior_sd: np.ndarray
    units: int
    active: int | None
    kl: float

    @property
    def ratio(self) -> float:
        """The median of posterior over prior sd: near 1 the data said nothing, 0 is a point estimate."""
        ratios = self.posterior_sd / np.where(self.prior_sd > 0, self.prior_sd, np.nan)
        return float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else float("nan")

    @property
    def is_point(self) -> bool:
        """Whether the guide has no spread where the prior has."""
        before = np.where(self.prior_sd > 0, self.prior_sd, 1.0)
        return self.units > 0 and bool((self.posterior_sd < 1e-6 * before).all())

    @property
    def collapsed(self) -> bool:
        """Whether the posterior is the prior, in every series: no unit active, and less than 0.01 nats per unit."""
        return self.active == 0 and self.kl < 0.01 * self.units

    @property
    def uninformed(self) -> bool:
        """Whether a shared latent has its prior as its posterior: the sd within 5 %, less than 0.01 nats per unit."""
        return self.active is None and abs(self.ratio - 1) < 0.05 and self.kl < 0.01 * self.units


@dataclass(frozen=True)
class Diagnosis:
    """Whether the posterior of a fit can be believed. `print` it for a table; `ok` is the summary.

    Attributes:
        verdicts: one per check.
        ids: the series.
        draws: from the guide.
        elbo: on the data, at the guide as it is.
        elbo_per_series: (series,) likewise, without the latents that series share; None without plates of series.
        evidence: the log evidence by `sd.evidence`, or None; then `no_evidence` says why.
        gap: what the guide loses, evidence - ELBO.
        gap_per_series: likewise, for each series given the latents that they share (where there are such: of the path
            alone).
        k_hat: of the importance weights of everything but the path, or of everything; None where `k_hat_per_series` is
            there instead.
        k_hat_per_series: (series,) where all latents belong to series.
        latents: by name.
        coverage: of what is observed.
        rescaling: by observed point process, that of the posterior draw with the median p-value.
        settling: of the training; None where the losses do not tell.

    Example:
        >>> diagnosis = Diagnosis((Verdict("k-hat", "bad", "k-hat 0.92"),), ("Ada",), 100, Estimate(-3.0, 0.1))
        >>> diagnosis.ok
        False
        >>> print(diagnosis)
        The posterior cannot be believed: k-hat.
        bad   k-hat     k-hat 0.92
    """

    verdicts: tuple[Verdict, ...]
    ids: tuple[Any, ...]
    draws: int
    elbo: Estimate
    elbo_per_series: Estimate | None = None
    evidence: Estimate | None = None
    no_evidence: str = ""
    gap: Estimate | None = None
    gap_per_series: Estimate | None = None
    k_hat: ParetoK | None = None
    k_hat_per_series: np.ndarray | None = None
    latents: tuple[LatentUse, ...] = ()
    coverage: Coverage | None = None
    rescaling: dict[str, TimeRescaling] | None = None
    settling: Settling | None = None

    @property
    def ok(self) -> bool:
        """Whether no check is bad. What was not measured (level "-") is not held against the fit."""
        return not any(v.level == "bad" for v in self.verdicts)

    @property
    def worst_series(self) -> Any:
        """The id of the series that loses most; None where the gap per series is not known."""
        return None if self.gap_per_series is None else self.ids[int(np.argmax(self.gap_per_series.value))]

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The names of collapsed latents."""
        return tuple(latent.name for latent in self.latents if latent.collapsed)

    def verdict(self, check: str) -> Verdict:
        """The verdict of one check."""
        return next(v for v in self.verdicts if v.check == check)

    def to_xarray(self) -> xr.Dataset:
        """The numbers per series, channel and latent as one data set.

        Example:
            >>> Diagnosis((), ("Ada",), 100, Estimate(-3.0, 0.1)).to_xarray()["elbo"].item()
            -3.0
        """
        found: dict[str, Any] = {"elbo": self.elbo.value}
        for name in ("evidence", "gap"):
            estimate = getattr(self, name)
            found |= {} if estimate is None else {name: estimate.value, f"{name}_error": estimate.error}
        for name in ("elbo_per_series", "gap_per_series"):
            estimate = getattr(self, name)
            found |= {} if estimate is None else {name: ("series", estimate.value)}
        if self.k_hat_per_series is not None:
            found["k_hat_per_series"] = ("series", self.k_hat_per_series)
        if self.k_hat is not None:
            found["k_hat"] = self.k_hat.k
        coords: dict[str, Any] = {"series": list(self.ids)}
        if self.latents:
            coords["latent"] = [latent.name for latent in self.latents]
            found["sd_ratio"] = ("latent", [latent.ratio for latent in self.latents])
            found["kl"] = ("latent", [latent.kl for latent in self.latents])
        if self.coverage is not None:
            coords |= {"channel": list(self.coverage.channels), "level": list(LEVELS)}
            found["coverage"] = (("channel", "level"), self.coverage.covered)
            found["coverage_error"] = (("channel", "level"), self.coverage.error)
        return xr.Dataset(found, coords=coords)

    def __str__(self) -> str:
        bad = [v.check for v in self.verdicts if v.level == "bad"]
        head = "Nothing measured here speaks against the posterior."
        if bad:
            head = f"The posterior cannot be believed: {', '.join(bad)}."
        return "\n".join([head, *map(str, self.verdicts), *self._table()])

    def _table(self) -> list[str]:
        if not self.latents:
            return []
        wide = max(6, *(len(latent.name) for latent in self.latents))
        lines = [f"{'latent':<{wide}}  numbers  active  posterior/prior sd        KL"]
        for use in self.latents:
            active = "-" if use.active is None else use.active
            per = "per series" if use.local else "in all"
            lines.append(
                f"{use.name:<{wide}}  {use.units:>7}  {active:>6}  {use.ratio:>18.2f}  {use.kl:>8.2f}  {per}"
            )
        return lines
