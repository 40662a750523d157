"""Estimates the curvature of a model and keeps it from step to step.

Imports all folders above, not `optimize`. Start with `estimator`, then `curvature`.
"""
