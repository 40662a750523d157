"""A step of `cgfac` without a learning rate: quadratic model and adapted damping.

Imports what `optimize` may, and its `state` and `safeguards`. Start with `step`.
"""
