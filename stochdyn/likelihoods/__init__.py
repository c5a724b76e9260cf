"""Likelihoods of data known in part: log probabilities of tails and intervals, and the censored distribution."""

from stochdyn.likelihoods.censored import Censored
from stochdyn.likelihoods.tails import log_at_least, log_at_most, log_between

__all__ = ["Censored", "log_at_least", "log_at_most", "log_between"]
