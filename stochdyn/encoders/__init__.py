"""Encoders: a `Series` to one vector per observation time, (series, time, hidden)."""

from stochdyn.encoders.antisymmetric import AntisymmetricEncoder, OrthogonalEncoder
from stochdyn.encoders.base import AbstractBackwardEncoder, AbstractEncoder, Rows, align
from stochdyn.encoders.convolutional import ConvEncoder
from stochdyn.encoders.ode_rnn import ODERNNEncoder
from stochdyn.encoders.recurrent import GRUEncoder
from stochdyn.encoders.sets import SetEncoder

__all__ = [
    "AbstractBackwardEncoder",
    "AbstractEncoder",
    "AntisymmetricEncoder",
    "ConvEncoder",
    "GRUEncoder",
    "ODERNNEncoder",
    "OrthogonalEncoder",
    "Rows",
    "SetEncoder",
    "align",
]
