"""Trees of arrays: compared, scaled, described."""

import jax
import numpy as np


def scaled(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def is_finite(tree):
    return all(
        np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree)
    )


def is_zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def describe(tree):
    """Shapes, dtypes and weak types of a tree's leaves."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), tree)
