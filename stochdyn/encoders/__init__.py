"""Encoders: a `Series` to one vector per observation time."""

from stochdyn.encoders.recurrent import AbstractEncoder, GRUEncoder, align
