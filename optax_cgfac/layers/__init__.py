"""From a layer's captured calls to the rows of its two Kronecker factors.

Imports `utils`, `operators` and `capture`. Start with `layer`.
"""
