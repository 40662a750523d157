"""The exact structures against the Fisher matrix of all parameters, by Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import optax_cgfac
import oracles
from models.linen_modules import Function, scanned
from optax_cgfac.layers.layer import matrix_from_leaves
from optax_cgfac.utils.paths import leaves_by_path
from problems import normal, ravel

pytestmark = pytest.mark.usefixtures("x64")

NUM_EXAMPLES = 4


F64 = {"param_dtype": jnp.float64}


@Function
def convolutional(x):
    x = nn.tanh(nn.Conv(2, (2, 2), name="conv", **F64)(x))
    x = nn.LayerNorm(name="norm", **F64)(x)
    grouped = {"strides": 2, "feature_group_count": 2}
    x = nn.Conv(2, (2, 2), name="grouped", **grouped, **F64)(x)
    return nn.Dense(2, name="out", **F64)(x.reshape(len(x), -1))


@Function
def shared(x):
    """One layer at every position, twice, and one at one."""
    layer = nn.Dense(3, name="shared", **F64)
    x = layer(nn.tanh(layer(x)))
    return nn.Dense(2, use_bias=False, name="out", **F64)(x.sum(1))


@Function
def tied(tokens):
    embed = nn.Embed(5, 3, name="embed", **F64)
    x = nn.Dense(3, name="mix", **F64)(embed(tokens))
    return embed.attend(nn.tanh(x)).mean(1)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(3, name="dense", **F64)(x)), None


@Function
def stacked(x):
    x, _ = scanned(Body, 2)(name="blocks")(x, None)
    return nn.Dense(2, name="out", **F64)(x)


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 5, (NUM_EXAMPLES, 3)))


PROBLEMS = {
    "convolution": (convolutional, lambda: normal(NUM_EXAMPLES, 3, 3, 1)),
    "shared": (shared, lambda: normal(NUM_EXAMPLES, 3, 3)),
    "tied": (tied, tokens),
    "stacked": (stacked, lambda: normal(NUM_EXAMPLES, 3)),
}


def make(name, kind="exact", **options):
    """The outputs as a function of the parameters, these, and the curvature."""
    model, inputs = PROBLEMS[name][0], PROBLEMS[name][1]()
    params = model.init(jax.random.key(0), inputs)["params"]
    params = jax.tree.map(
        lambda p: p + 0.3 * normal(*p.shape, seed=p.size).astype(p.dtype), params
    )

    def model_fn(params, inputs):
        return model.apply({"params": params}, inputs)

    options = {"examples": NUM_EXAMPLES, "window": 1, "positions": None} | options
    estimator = optax_cgfac.fisher_estimator(
        model_fn, "softmax_cross_entropy", kind=kind, **options
    )
    curvature = estimator.init(params, inputs)
    rng = jax.random.key(1) if kind == "mc" else None
    curvature = jax.jit(estimator.update)(curvature, params, inputs, rng=rng)
    return lambda params: model_fn(params, inputs), params, curvature


def dense_fisher(outputs, params):
    """The Gauss-Newton matrix over the raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    # The Hessian of this loss is that of the cross-entropy.
    return oracles.gauss_newton(lambda x: outputs(unravel(x)), flat, jax.nn.logsumexp)


def order(params, tag):
    """Where the entries of a layer's matrices are among the raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    numbered = leaves_by_path(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    matrix = matrix_from_leaves(tag, {path: numbered[path] for path in tag.leaves})
    return np.asarray(matrix, int)


@pytest.mark.parametrize("name", PROBLEMS)
def test_block_is_the_diagonal_block_of_the_fisher(name):
    outputs, params, curvature = make(name)
    fisher = dense_fisher(outputs, params)
    for tag in curvature.tags:
        operator = curvature.operator(tag.name, structure="block")
        positions = order(params, tag)
        v = normal(*positions.shape)
        places = positions.reshape(-1, positions.shape[-2] * positions.shape[-1])
        dense = operator.to_dense().reshape(*places.shape, -1)
        image, diagonal, flat_v = (
            x.reshape(places.shape)
            for x in (operator.matvec(v), operator.diagonal(), v)
        )
        trace = jnp.ravel(operator.trace())
        for i, own in enumerate(places):
            expected = fisher[np.ix_(own, own)]
            assert oracles.relative_error(dense[i], expected) < 1e-10
            assert oracles.relative_error(image[i], expected @ flat_v[i]) < 1e-10
            assert oracles.relative_error(diagonal[i], np.diag(expected)) < 1e-10
            assert trace[i] == pytest.approx(np.trace(expected), rel=1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_full_is_the_whole_fisher(name):
    outputs, params, curvature = make(name)
    fisher = dense_fisher(outputs, params)
    operator = curvature.operator(None, structure="full")
    places = np.concatenate([order(params, tag).ravel() for tag in curvature.tags])
    assert len(places) == len(fisher)
    expected = fisher[np.ix_(places, places)]
    assert oracles.relative_error(operator.to_dense(), expected) < 1e-10
    assert operator.trace() == pytest.approx(np.trace(expected), rel=1e-10)
    diagonal = np.concatenate([np.ravel(x) for x in operator.diagonal()])
    assert oracles.relative_error(diagonal, np.diag(expected)) < 1e-10


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("structure", ["block", "full"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_update_is_the_dense_solution(name, structure, solver):
    _, params, curvature = make(name, kind="mc")
    damping = 0.03
    grads = jax.tree.map(lambda p: normal(*p.shape, seed=7), params)
    limits = {"max_steps": 200, "rtol": 1e-12} if solver == "cg" else {}
    tx = optax_cgfac.scale_by_cgfac(
        damping, structure=structure, solver=solver, **limits
    )
    updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    updates, flat = ravel(updates), ravel(grads)
    groups = [order(params, tag) for tag in curvature.tags]
    if structure == "full":
        dense = curvature.operator(None, structure="full").to_dense()
        pairs = [(dense, np.concatenate([group.ravel() for group in groups]))]
    else:
        pairs = []
        for tag, group in zip(curvature.tags, groups, strict=True):
            dense = curvature.operator(tag.name, structure="block").to_dense()
            group = group.reshape(-1, group.shape[-2] * group.shape[-1])
            dense = dense.reshape(len(group), *dense.shape[-2:])
            pairs += list(zip(dense, group, strict=True))
    for dense, places in pairs:
        expected = oracles.solve(dense + damping * np.eye(len(dense)), flat[places])
        assert oracles.relative_error(updates[places], expected) < 1e-7


@pytest.mark.parametrize("structure", ["block", "full"])
def test_sample_space_has_the_iterates_of_parameter_space(structure):
    _, params, curvature = make("shared", kind="mc")
    grads = jax.tree.map(lambda p: normal(*p.shape, seed=7), params)
    start = jax.tree.map(lambda p: normal(*p.shape, seed=8), params)
    for steps in (1, 2, 5, 10):
        results = []
        for space in ("sample", "parameter"):
            tx = optax_cgfac.scale_by_cgfac(
                0.1, structure=structure, space=space, max_steps=steps, rtol=0.0
            )
            state = tx.init(params)._replace(warm_start=start)
            updates, _ = tx.update(grads, state, params, curvature=curvature)
            results.append(ravel(updates))
        assert oracles.relative_error(*results) < 1e-10


@pytest.mark.parametrize(
    "options",
    [{"positions": 1}, {"weight_sharing": "reduce"}],
    ids=["some positions", "reduced"],
)
def test_rows_without_an_examples_whole_gradient_are_refused(options):
    *_, curvature = make("shared", **options)
    with pytest.raises(ValueError, match=r"'shared' keeps some .*positions=None"):
        curvature.operator("shared", structure="block")
    with pytest.raises(ValueError, match=r"'shared' keeps some .*positions=None"):
        curvature.operator(None, structure="full")


def test_full_takes_no_path_and_the_others_need_one():
    *_, curvature = make("shared")
    for arguments in ({"path": "shared", "structure": "full"}, {"path": None}):
        with pytest.raises(ValueError, match="structure='full' takes path=None"):
            curvature.operator(**arguments)
