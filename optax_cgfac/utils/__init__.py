"""Shared helpers: types, tree paths, arrays, linear algebra, devices, validation.

Imports nothing else of the package. Start with `types`.
"""
