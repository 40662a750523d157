"""Capture in Flax NNX. Imports what `capture` may; start with `tap`."""
