"""Linear maps: rows of a factor, Kronecker-factored curvature, exact Fisher blocks.

Imports `utils` only. Start with `kronecker`.
"""
