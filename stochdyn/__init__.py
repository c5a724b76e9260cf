"""Probabilistic models of stochastic and jump dynamics in Pyro: a path is one sample site."""
