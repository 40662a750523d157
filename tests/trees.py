"""Trees of arrays: compared, scaled, described; modules of NNX are trees, too."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx


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


class Snapshot(NamedTuple):
    """A tree, or a module of NNX with all that its attributes hold."""

    structure: Any
    modules: list[Any]
    arrays: list[Any]

    def assert_equal(self, other):
        assert self[:2] == other[:2]
        for x, y in zip(self.arrays, other.arrays, strict=True):
            np.testing.assert_array_equal(x, y)


def snapshot(tree):
    structure, state, modules = jax.tree.structure(tree), tree, []
    if isinstance(tree, nnx.Module):
        structure, state = nnx.split(tree)
        modules = [(type(m), sorted(vars(m))) for _, m in nnx.iter_modules(tree)]
    keys = jax.dtypes.prng_key
    arrays = [
        np.array(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, keys) else x)
        for x in jax.tree.leaves(state)
    ]
    return Snapshot(structure, modules, arrays)
