"""Linear maps: rows of a factor, Kronecker-factored curvature, exact Fisher blocks.

Imports `utils`. Start with `kronecker`.
"""
