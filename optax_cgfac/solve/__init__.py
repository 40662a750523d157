"""Solves the damped systems of the layers. Works on operators and never sees Flax.

Imports `utils` and `operators`. Start with `choose`, which picks a solver.
"""
