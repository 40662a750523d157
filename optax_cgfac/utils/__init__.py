"""Helpers without any idea of curvature: arrays, linear algebra, devices, checks.

Imports nothing from the package. Start with `types`.
"""
