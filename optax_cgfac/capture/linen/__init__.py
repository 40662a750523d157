"""Capture in Flax Linen. Imports what `capture` may; start with `tap`."""
