"""Runs a Flax model and captures the inputs and output cotangents of its layers.

Imports `utils`. Start with `run`, then `linen/tap` and `nnx/tap`.
"""
