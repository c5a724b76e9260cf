"""Guides: variational posteriors that read the model."""

from stochdyn.guides.amortized import AmortizedGuide
from stochdyn.guides.flow import Flow
from stochdyn.guides.local_flow import LocalFlow
from stochdyn.guides.marginals import Marginals
from stochdyn.guides.messages import FilterMessage, FreeMessage
from stochdyn.guides.posterior_drift import PosteriorDrift
from stochdyn.guides.sites import FullRank, MeanField
