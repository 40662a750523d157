"""The Optax transformations: from gradients and curvature to updates.

Imports every folder above. Start with `cgfac`.
"""
