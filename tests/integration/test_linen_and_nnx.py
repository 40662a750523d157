"""A Linen model and its NNX twin with equal weights take equal steps."""

import jax
import numpy as np
import pytest
from flax import nnx

from models.common import by_name
from models.table import TABLE
from optax_cgfac import cgfac, fisher_estimator
from training import nnx_step, train_step
from trees import assert_trees_close

TWINS = [
    "mlp",
    "embed and attend",
    "self-attention",
    "conv strides",
    "conv_transpose strides SAME",
    "einsum per head",
    "GroupNorm",
    "PReLU",
]


def twins(name):
    linen, module = TABLE[name].linen(), TABLE[name].nnx()
    nnx.update(module.model, linen.params)
    return linen, module


def assert_equal_leaves(linen, module):
    linen, module = by_name(linen), by_name(module)
    assert linen.keys() == module.keys()
    scale = max(np.abs(leaf).max() for leaf in linen.values())
    for path, leaf in linen.items():
        difference = np.abs(leaf - module[path]).max()
        assert difference <= 1e-6 * scale, (path, difference / scale)


@pytest.mark.parametrize("name", TWINS)
def test_optimizers_take_equal_steps(name):
    linen, module = twins(name)
    tx, batch = cgfac(), {"x": linen.inputs}
    options = {"loss": "squared_error", "examples": 4}
    estimator = fisher_estimator(linen.model_fn, **options)
    state = linen.params, tx.init(linen.params)
    state = (*state, estimator.init(linen.params, linen.inputs))
    linen_step = jax.jit(train_step(tx, estimator, lambda p, b: linen.loss(p, b["x"])))

    model = module.model
    estimator = fisher_estimator(module.model_fn, **options)
    curvature = estimator.init(model, linen.inputs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    module_step = nnx.jit(nnx_step(estimator, lambda m, b: module.loss(m, b["x"])))
    assert curvature.tags == state[2].tags
    for seed in range(3):
        rng = jax.random.key(seed)
        state, _ = linen_step(state, batch, rng)
        curvature, _ = module_step(model, optimizer, curvature, batch, rng)
        if seed == 0:
            assert_equal_leaves(state[0], nnx.state(model, nnx.Param))
    found = by_name(nnx.state(model, nnx.Param))
    assert_trees_close(found, by_name(state[0]), rtol=1e-3, atol=1e-4)
