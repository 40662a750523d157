"""Estimates the curvature of a model and keeps it from step to step.

Imports every folder above. Start with `curvature`, then `estimator`.
"""
