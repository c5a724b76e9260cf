"""Guides: variational posteriors that read the model."""

from stochdyn.guides.amortized import AmortizedGuide
from stochdyn.guides.messages import FilterMessage, FreeMessage
from stochdyn.guides.sites import FullRank, MeanField
