"""Solvers of other libraries; each library is imported in one file, at the first use."""
