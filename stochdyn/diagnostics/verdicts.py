"""From the numbers of a diagnosis to verdicts in words: the thresholds are here, and nowhere else."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stochdyn.diagnostics.coverage import LEVELS, Coverage
from stochdyn.diagnostics.diagnosis import LatentUse, Level, Verdict
from stochdyn.diagnostics.importance import ParetoK
from stochdyn.diagnostics.rescaling import TimeRescaling
from stochdyn.diagnostics.settling import Settling
from stochdyn.diagnostics.weights import Estimate

RICHER = "Train on; a richer guide (docs/guides.md): FullRank or Flow, LocalFlow for latents of series, FreeMessage."
UNWEIGHTED = "Use the draws as they are; reweighted averages would have no useful error bars."
NO_LATENTS = "no latents: the likelihood is exact, nothing is lost"
OTHER_MODEL = "the guide was made for another model, whose evidence it would give"
POINTS = "the guide is a point estimate, so there is no posterior to weigh"
WRONG_PROCESS = "Another process: docs/point_processes.md, Which process, and Is it the right process?"
MANY = 20  # numbers from which on small errors make k-hat large
_HOW = {
    "hidden": "each hidden from the guide",
    "reweighted": "each left out by reweighting",
    "seen": "smoothing residuals: optimistic",
}
_SHORT = ((0.08, 0.15), (0.04, 0.1))  # by which coverage may miss its level: fair, bad
CLOSE = 0.1  # nats; the total variation is then below 0.23
NEARLY = 0.99  # of the draws: a standard deviation of 0.93 of the truth or better
SMALL_GAP = 0.03  # nats per number: a standard deviation of 0.83 of the truth


def judge_gap(
    per_series: Estimate, ids: Sequence[Any], points: np.ndarray, shared: Estimate | None
) -> Verdict:
    """The gap of the worst series against its number of readings, and that of the shared latents.

    Example:
        >>> judge_gap(Estimate(np.array([0.1, 9.0]), np.array([0.1, 0.1])), ["a", "b"], np.array([5, 5]), None).level
        'bad'
    """
    least = per_series.value - 2 * per_series.error
    level = _worst(
        _grade(g, max(0.5, 0.02 * n), max(2.0, 0.1 * n)) for g, n in zip(least, points, strict=True)
    )
    worst = int(np.argmax(per_series.value))
    found = (
        f"{per_series.value.mean():.2f} nats per series, most in series {ids[worst]!r}: "
        f"{per_series.value[worst]:.2f} +- {per_series.error[worst]:.2f}"
    )
    if shared is not None:
        level = _worst([level, _grade(shared.value - 2 * shared.error, 0.5, 2.0)])
        found += f"; {shared} in the latents that series share"
    return Verdict("gap", level, found, "" if level == "good" else RICHER)


def judge_tail(k: ParetoK, what: str, numbers: int, gap: Estimate) -> Verdict:
    """One k-hat, and what the mean of the weights says besides.

    Over many numbers a large k-hat is no verdict by itself: then the gap per number decides. So does a gap below 0.1
    nats, unless k is 1 or more, where the gap is not known. Over few a good k-hat is none either: a standard deviation
    of half the truth has k = 0.75, often estimated below the threshold, and a gap of 0.32.

    Args:
        k: the fit.
        what: whose weights they are.
        numbers: how many numbers these latents have.
        gap: log mean weight - mean log weight, an estimate of the gap from below.

    Example:
        >>> judge_tail(ParetoK(0.2, False, 400, 0.6, 300.0), "theta", 1, Estimate(0.1, 0.02)).level
        'good'
        >>> judge_tail(ParetoK(0.5, False, 400, 0.6, 300.0), "theta", 1, Estimate(0.3, 0.02)).level
        'bad'
        >>> judge_tail(ParetoK(0.9, False, 400, 0.6, 10.0), "theta", 1, Estimate(0.5, 0.1)).level
        'bad'
        >>> judge_tail(ParetoK(0.9, False, 400, 0.6, 10.0), "z", 100, Estimate(1.0, 0.1)).level
        'fair'
    """
    if np.isnan(k.k):
        return _not_finite(f"of {what}")
    found = f"{k} of {what}"
    if _equal(k):
        return Verdict(
            "k-hat",
            "good",
            found if k.exact else f"weights nearly equal, worth {k.ess:.0f} of {k.draws} draws, of {what}",
        )
    if k.good:
        return _few(found, numbers, gap.value - 2 * gap.error)
    if numbers > MANY and gap.value < SMALL_GAP * numbers:
        return Verdict("k-hat", "fair", f"{found}, {numbers} numbers", UNWEIGHTED)
    if k.k < 1 and gap.value < CLOSE:
        return Verdict("k-hat", "fair", f"{found}, but only {gap.value:.2f} nats lost", UNWEIGHTED)
    return Verdict("k-hat", "bad", found, RICHER)


def _equal(k: ParetoK) -> bool:
    """Whether the weights hardly differ: then k, which knows no scale, is that of rounding errors."""
    return k.ess > NEARLY * k.draws


def _few(found: str, numbers: int, gap: float) -> Verdict:
    """The verdict where k-hat is good."""
    level = _grade(gap, max(CLOSE, SMALL_GAP * numbers), max(1.5 * CLOSE, 0.1 * numbers))
    if level == "good":
        return Verdict("k-hat", level, found)
    return Verdict("k-hat", level, f"{found}; but {gap:.2f} nats lost or more", RICHER)


def judge_tails(ks: Sequence[ParetoK], ids: Sequence[Any], what: str, numbers: int, gap: Estimate) -> Verdict:
    """A k-hat per series: bad where more than a tenth of them is not good; else as for one, by the median gap.

    Example:
        >>> good, bad = ParetoK(0.2, False, 400, 0.6, 300.0), ParetoK(0.9, False, 400, 0.6, 10.0)
        >>> judge_tails([good, bad], ["a", "b"], "z", 2, Estimate(np.ones(2), np.zeros(2))).found
        "1 of 2 series not below 0.60, the largest 0.90 in series 'b', of z"
    """
    values = np.array([k.k for k in ks])
    if np.isnan(values).any():
        return _not_finite(f"of series {ids[int(np.isnan(values).argmax())]!r}")
    if len(ks) == 1:
        return judge_tail(ks[0], what, numbers, Estimate(gap.value[0], gap.error[0]))
    over, limit = np.array([not k.good and not _equal(k) for k in ks]), ks[0].threshold
    worst = int(np.where(over, values, -np.inf).argmax())
    if all(k.exact for k in ks):
        return Verdict("k-hat", "good", f"exact in all {len(ks)} series (all weights equal), of {what}")
    if not over.any():
        found = f"below {limit:.2f} in all {len(ks)} series, of {what}"
        return _few(found, numbers, float(np.median(gap.value - 2 * gap.error)))
    found = (
        f"{over.sum()} of {len(ks)} series not below {limit:.2f}, the largest {values[worst]:.2f} in series "
        f"{ids[worst]!r}, of {what}"
    )
    if over.mean() <= 0.1:
        return Verdict("k-hat", "fair", found, "Look at these series: `k_hat_per_series`.")
    if numbers > MANY and np.median(gap.value[over]) < SMALL_GAP * numbers:
        return Verdict("k-hat", "fair", f"{found}, {numbers} numbers", UNWEIGHTED)
    return Verdict("k-hat", "bad", found, RICHER)


def judge_latents(latents: Sequence[LatentUse], trusted: bool) -> Verdict:
    """Point estimates, collapse, and latents on which the data say nothing.

    Args:
        latents: all of them.
        trusted: whether gap and k-hat are good, so that a posterior like the prior is right under this model.

    Example:
        >>> ones = np.ones((5, 1))
        >>> judge_latents([LatentUse("z", True, ones, ones, 1, 0, 0.0)], trusted=False).found
        'collapsed, the same posterior as the prior in every series: z'
    """
    points = [latent.name for latent in latents if latent.is_point]
    collapsed = [latent.name for latent in latents if latent.collapsed]
    idle = [latent.name for latent in latents if latent.uninformed]
    if points:
        found = f"no spread, a point estimate: {', '.join(points)}"
        return Verdict(
            "latents", "bad", found, "Use AmortizedGuide(model) or AutoNormal in place of a Delta guide."
        )
    if collapsed:
        found = f"collapsed, the same posterior as the prior in every series: {', '.join(collapsed)}"
        advice = "docs/fitting.md, Posterior collapse: a KL weight that rises (Linear), Aggressive, a weaker decoder."
        if trusted:
            found += ". The weights agree: under this model the data say nothing about it"
        return Verdict("latents", "fair" if trusted else "bad", found, advice)
    if idle:
        found = f"posterior = prior: {', '.join(idle)}"
        return Verdict(
            "latents", "fair", found, "The data say nothing about it, or the guide ignores them: see k-hat."
        )
    if latents and not any(np.isfinite(latent.prior_sd).any() for latent in latents):
        return Verdict(
            "latents", "-", "the prior could not be simulated, so there is nothing to compare with"
        )
    return Verdict("latents", "good", "all have moved from their priors" if latents else "there are none")


def judge_coverage(found: Coverage) -> Verdict:
    """Too few observations inside is bad, too many is fair, in units of standard errors and of the level; the channel
    that the verdict comes from is named.

    Example:
        >>> u = np.random.default_rng(0).uniform(size=500)
        >>> judge_coverage(Coverage.of(("y",), [u], how="hidden")).level
        'good'
        >>> judge_coverage(Coverage.of(("y",), [(u > 0.5) * 0.98 + 0.01], how="hidden")).level
        'bad'
    """
    if not found.points.any():
        return Verdict("coverage", "-", "nothing was observed")
    short, fair = np.nan_to_num(np.array(LEVELS) - found.covered), np.array(_SHORT)[:, 0]
    sure = np.where(np.abs(short) > 3 * found.error, short, 0.0)
    few = _worst(_grade(x, *_SHORT[k]) for row in sure for k, x in enumerate(row))
    many: Level = "fair" if found.how == "hidden" and (-sure > fair).any() else "good"
    level, narrow = _worst([few, many]), few != "good"
    off = np.abs(short) if level == "good" else sure / fair if narrow else -sure / fair
    worst = int((off[:, 1] if level == "good" else off.max(1)).argmax())
    text = ", ".join(
        f"{100 * c:.0f} % in {100 * p:.0f} %" for c, p in zip(found.covered[worst], LEVELS, strict=True)
    )
    text += f" intervals ({found.points[worst]} values of channel {found.channels[worst]!r}"
    text += f", {_HOW[found.how]})"
    if level == "good":
        # The posterior saw these values, so that most lie inside says nothing.
        return Verdict("coverage", "-" if found.how == "seen" else level, text)
    if narrow:
        return Verdict(
            "coverage",
            level,
            text,
            "Intervals too narrow: train on, or the model is wrong (noise, drift).",
        )
    return Verdict(
        "coverage", level, text, "Intervals are wider than the data need: look at the noise of the model."
    )


def judge_rescaling(found: dict[str, TimeRescaling]) -> Verdict:
    """Bad where a point process is rejected at level 0.01.

    Example:
        >>> judge_rescaling({"y": TimeRescaling(np.ones(20), 0.4, 1e-6, 0.0, 0.9)}).level
        'bad'
    """
    rejected = [name for name, test in found.items() if test.rejects()]
    text = "; ".join(f"{name}: {test}" for name, test in found.items())
    if rejected:
        return Verdict(
            "jumps",
            "bad",
            text,
            WRONG_PROCESS,
        )
    return Verdict("jumps", "good", text)


def judge_settling(found: Settling | str) -> Verdict:
    """Whether the losses still moved at the end.

    Example:
        >>> judge_settling(Settling(drift=50.0, error=1.0, noise=2.0, steps=100)).level
        'bad'
    """
    if isinstance(found, str):
        return Verdict("training", "-", found)
    level = _grade(found.ratio, 0.25, 1.0)
    way = "fell" if found.drift > 0 else "rose"
    text = f"loss {way} by {abs(found.drift):.2g} over the last {found.steps} steps, noise {found.noise:.2g}"
    if level == "good":
        return Verdict("training", level, text)
    advice = "Not settled: more steps" if found.drift > 0 else "The loss rises: a lower lr"
    return Verdict("training", level, text, f"{advice} (docs/fitting.md, Learning rate).")


def _not_finite(where: str) -> Verdict:
    found = f"importance weights {where} are not finite"
    return Verdict("k-hat", "bad", found, "Find the draw: lp and log_q of sd.to_arviz(fit, data).")


def _grade(x: float, fair: float, bad: float) -> Level:
    return "good" if x <= fair else "fair" if x <= bad else "bad"


def _worst(levels: Any) -> Level:
    order: list[Level] = ["-", "good", "fair", "bad"]
    return max(levels, key=order.index, default="-")
