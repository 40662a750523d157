"""The exact structures against the Fisher matrix of all parameters, by Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_cgfac
import oracles
from optax_cgfac.layers.layer import matrix_from_leaves
from optax_cgfac.utils.paths import leaves_by_path

NUM_EXAMPLES = 4


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(2, (2, 2), param_dtype=x.dtype, name="conv")(x))
        x = nn.LayerNorm(param_dtype=x.dtype, name="norm")(x)
        x = nn.Conv(
            2,
            (2,) * 2,
            strides=2,
            feature_group_count=2,
            param_dtype=x.dtype,
            name="grouped",
        )(x)
        return nn.Dense(2, param_dtype=x.dtype, name="out")(x.reshape(len(x), -1))


class Shared(nn.Module):
    """One layer at every position, twice, and one at one."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, param_dtype=x.dtype, name="shared")
        x = layer(nn.tanh(layer(x)))
        return nn.Dense(2, use_bias=False, param_dtype=x.dtype, name="out")(x.sum(1))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 3, param_dtype=jnp.float64, name="embed")
        x = nn.Dense(3, param_dtype=jnp.float64, name="mix")(embed(tokens))
        return embed.attend(nn.tanh(x)).mean(1)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            Body,
            variable_axes={"params": 0} | optax_cgfac.capture_axes(),
            split_rngs={"params": True},
            length=2,
        )
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(2, param_dtype=x.dtype, name="out")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(3, param_dtype=x.dtype, name="dense")(x)), None


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 5, (NUM_EXAMPLES, 3)))


PROBLEMS = {
    "convolution": (Convolutional(), lambda: normal(NUM_EXAMPLES, 3, 3, 1)),
    "shared": (Shared(), lambda: normal(NUM_EXAMPLES, 3, 3)),
    "tied": (Tied(), tokens),
    "stacked": (Stacked(), lambda: normal(NUM_EXAMPLES, 3)),
}


def make(name, kind="exact", **options):
    """The model, parameters, inputs, the estimator and its curvature of the batch."""
    model, inputs = PROBLEMS[name][0], PROBLEMS[name][1]()
    params = model.init(jax.random.key(0), inputs)["params"]
    params = jax.tree.map(
        lambda p: p + 0.3 * normal(*p.shape, seed=p.size).astype(p.dtype), params
    )

    def model_fn(params, inputs):
        return model.apply({"params": params}, inputs)

    estimator = optax_cgfac.fisher_estimator(
        model_fn,
        "softmax_cross_entropy",
        kind=kind,
        examples=NUM_EXAMPLES,
        window=1,
        **({"positions": None} | options),
    )
    curvature = estimator.init(params, inputs)
    rng = jax.random.key(1) if kind == "mc" else None
    curvature = jax.jit(estimator.update)(curvature, params, inputs, rng=rng)
    return model_fn, params, inputs, curvature


def dense_fisher(model_fn, params, inputs):
    """The Gauss-Newton matrix over the raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(z):
        return jax.nn.logsumexp(z)  # its Hessian is that of the cross-entropy

    return oracles.gauss_newton(
        lambda x, inputs: model_fn(unravel(x), inputs), flat, inputs, loss
    )


def order(params, tag):
    """Where the entries of a layer's matrices are among the raveled parameters."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    numbered = leaves_by_path(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    matrix = matrix_from_leaves(tag, {path: numbered[path] for path in tag.leaves})
    return np.asarray(matrix, int)


@pytest.mark.parametrize("name", PROBLEMS)
def test_block_is_the_diagonal_block_of_the_fisher(name, x64):
    model_fn, params, inputs, curvature = make(name)
    fisher = dense_fisher(model_fn, params, inputs)
    for tag in curvature.tags:
        operator = curvature.operator(tag.name, structure="block")
        positions = order(params, tag)
        stack = positions.reshape(-1, *positions.shape[-2:])
        dense = operator.to_dense().reshape(len(stack), *operator.to_dense().shape[-2:])
        v = normal(*positions.shape)
        image = operator.matvec(v).reshape(stack.shape)
        for index, places in enumerate(stack):
            expected = fisher[np.ix_(places.ravel(), places.ravel())]
            assert oracles.relative_error(dense[index], expected) < 1e-10
            product = (expected @ np.asarray(v).reshape(len(stack), -1)[index]).reshape(
                places.shape
            )
            assert oracles.relative_error(image[index], product) < 1e-10
            diagonal = operator.diagonal().reshape(stack.shape)[index].ravel()
            assert oracles.relative_error(diagonal, np.diag(expected)) < 1e-10
            trace = jnp.ravel(operator.trace())[index]
            assert trace == pytest.approx(np.trace(expected), rel=1e-10)
            low, high = (jnp.ravel(x)[index] for x in operator.eigenvalue_extremes())
            values = np.linalg.eigvalsh(expected)
            assert high == pytest.approx(values[-1], rel=1e-9)
            assert low == pytest.approx(max(values[0], 0), abs=1e-12 * values[-1])


@pytest.mark.parametrize("name", PROBLEMS)
def test_full_is_the_whole_fisher(name, x64):
    model_fn, params, inputs, curvature = make(name)
    fisher = dense_fisher(model_fn, params, inputs)
    operator = curvature.operator(None, structure="full")
    places = np.concatenate([order(params, tag).ravel() for tag in curvature.tags])
    assert len(places) == len(fisher)
    expected = fisher[np.ix_(places, places)]
    assert oracles.relative_error(operator.to_dense(), expected) < 1e-10
    assert operator.trace() == pytest.approx(np.trace(expected), rel=1e-10)
    assert operator.eigenvalue_extremes()[1] == pytest.approx(
        np.linalg.eigvalsh(expected)[-1], rel=1e-9
    )


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("structure", ["block", "full"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_update_is_the_dense_solution(name, structure, solver, x64):
    _, params, _, curvature = make(name, kind="mc", samples=2)
    damping = 0.03
    grads = jax.tree.map(lambda p: normal(*p.shape, seed=7), params)
    tx = optax_cgfac.scale_by_cgfac(
        damping, structure=structure, solver=solver, max_steps=200, rtol=1e-12
    )
    updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    flat_updates = jax.flatten_util.ravel_pytree(updates)[0]
    flat = np.asarray(jax.flatten_util.ravel_pytree(grads)[0])
    groups = [order(params, tag) for tag in curvature.tags]
    if structure == "full":
        dense = oracles.float64(curvature.operator(None, structure="full").to_dense())
        places = np.concatenate([group.ravel() for group in groups])
        pairs = [(dense, places)]
    else:
        pairs = []
        for tag, group in zip(curvature.tags, groups, strict=True):
            dense = curvature.operator(tag.name, structure="block").to_dense()
            group = group.reshape(-1, group.shape[-2] * group.shape[-1])
            dense = oracles.float64(dense).reshape(len(group), *dense.shape[-2:])
            pairs += list(zip(dense, group, strict=True))
    for dense, places in pairs:
        expected = oracles.solve(dense + damping * np.eye(len(dense)), flat[places])
        assert oracles.relative_error(flat_updates[places], expected) < 1e-7


@pytest.mark.parametrize("structure", ["block", "full"])
def test_sample_space_has_the_iterates_of_parameter_space(structure, x64):
    _, params, _, curvature = make("shared", kind="mc")
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
            results.append(jax.flatten_util.ravel_pytree(updates)[0])
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


@pytest.mark.parametrize("structure", ["block", "full"])
def test_cgfac_trains_with_the_exact_structures(structure):
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, 64))
    params = model.init(jax.random.key(0), x)["params"]

    def model_fn(params, x):
        return model.apply({"params": params}, x)

    def loss_fn(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(model_fn(params, x), y)
        return jnp.mean(losses)

    estimator = optax_cgfac.fisher_estimator(
        model_fn, "softmax_cross_entropy", examples=16, window=4
    )
    tx = optax_cgfac.cgfac(structure=structure)

    @jax.jit
    def step(carry, rng):
        params, state, curvature = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        curvature = estimator.update(curvature, params, x, rng=rng)
        updates, state = tx.update(
            grads, state, params, curvature=curvature, value=loss, value_fn=loss_fn
        )
        return (optax.apply_updates(params, updates), state, curvature), loss

    carry = params, tx.init(params), estimator.init(params, x)
    keys = jax.random.split(jax.random.key(1), 60)
    carry, losses = jax.lax.scan(step, carry, keys)
    assert losses[-1] < 0.5 * losses[0]
