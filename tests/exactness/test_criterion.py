"""Reductions, weights, several outputs and samples against the dense Gauss-Newton."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import optax_cgfac
import oracles
from optax_cgfac.optimize.adaptive.quadratic_model import gauss_newton_products
from optax_cgfac.utils.paths import leaves_by_path
from problems import normal, ravel

pytestmark = pytest.mark.usefixtures("x64")

N, T, C = 5, 3, 2
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], float)


class Heads(nn.Module):
    """A classifier for each position, and one number for the whole example."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, param_dtype=x.dtype, name="body")(x))
        per_position = nn.Dense(C, param_dtype=x.dtype, name="class")(x)
        return per_position, nn.Dense(1, param_dtype=x.dtype, name="size")(x.mean(1))


def batch():
    return {"x": normal(N, T, 3), "mask": jnp.asarray(MASK)}


def mask(inputs):
    return inputs["mask"]


def both(params, inputs):
    return Heads().apply({"params": params}, inputs["x"])


def first(params, inputs):
    return both(params, inputs)[0]


def parameters():
    params = Heads().init(jax.random.key(0), batch()["x"])["params"]
    return jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)


def smoothed(z):
    """The cross-entropy of smoothed labels: its Hessian does not depend on labels."""
    return -jnp.array([0.9, 0.1]) @ jax.nn.log_softmax(z)


def dense(params, loss=smoothed, factors=MASK**0 / T, head=0):
    """``1/N Σ factor_nt Jᵀ H J`` over the raveled parameters."""
    flat, unravel = ravel_pytree(params)
    return oracles.gauss_newton(
        lambda flat: both(unravel(flat), batch())[head], flat, loss, factors / N
    )


def start(model_fn, loss, params, kind="exact", **options):
    estimator = optax_cgfac.fisher_estimator(
        model_fn,
        loss,
        kind=kind,
        examples=N,
        window=1,
        positions=None,
        fallback=True,
        **options,
    )
    return estimator.update, estimator.init(params, batch())


def estimate(model_fn, loss, params, kind="exact", targets=None, rng=None, **options):
    update, curvature = start(model_fn, loss, params, kind, **options)
    return update(curvature, params, batch(), rng=rng, targets=targets)


def full(params, curvature, matrix=None):
    """The full Fisher over the raveled parameters, zero where uncovered."""
    flat, unravel = ravel_pytree(params)
    numbered = leaves_by_path(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    places = []
    for tag in curvature.tags:
        kernel, bias = (np.asarray(numbered[path], int) for path in tag.leaves)
        places.append(np.vstack([kernel, bias]).ravel())
    places = np.concatenate(places)
    result = np.zeros((flat.size, flat.size))
    if matrix is None:
        matrix = curvature.operator(None, structure="full").to_dense()
    result[np.ix_(places, places)] = matrix
    return result


def sampled(params, model_fn, loss, count, seed=0, **options):
    """The mean full Fisher of so many draws of targets."""
    update, curvature = start(model_fn, loss, params, "mc", **options)

    def draw(key):
        drawn = update(curvature, params, batch(), rng=key)
        return drawn.operator(None, structure="full").to_dense()

    keys = jax.random.split(jax.random.key(seed), count)
    mean = jax.jit(lambda keys: jnp.mean(jax.vmap(draw)(keys), 0))(keys)
    return full(params, curvature, mean)


def assert_exact(params, curvature, expected):
    """The operator's matrix, and products of the model with two vectors."""
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10
    vectors = [
        jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in (1, 2)
    ]
    flat = np.stack([ravel(v) for v in vectors])
    products = gauss_newton_products(curvature, params, vectors)
    assert oracles.relative_error(products, flat @ expected @ flat.T) < 1e-10


FACTORS = {
    ("mean", False): np.full((N, T), 1 / T),
    ("mean_of_sums", False): np.ones((N, T)),
    ("sum", False): np.full((N, T), float(N)),
    ("mean", True): MASK * N / MASK.sum(),
    ("mean_of_sums", True): MASK,
    ("sum", True): MASK * N,
}


@pytest.mark.parametrize(("reduction", "weighted"), FACTORS)
def test_the_fisher_of_every_reduction_and_weight(reduction, weighted):
    params = parameters()
    options = {"reduction": reduction, "weights": mask if weighted else None}
    curvature = estimate(first, "softmax_cross_entropy", params, **options)
    expected = dense(params, factors=FACTORS[reduction, weighted])
    assert_exact(params, curvature, expected)


def test_outputs_with_a_loss_each_add_up():
    params = parameters()
    squared = optax_cgfac.Loss.named("squared_error", weight=0.3)
    curvature = estimate(both, ("softmax_cross_entropy", squared), params)
    of_size = dense(params, lambda z: jnp.sum(z**2), np.ones(N), head=1)
    assert_exact(params, curvature, dense(params) + 0.3 * of_size)


@pytest.mark.parametrize(
    ("model_fn", "loss", "options"),
    [
        (first, "softmax_cross_entropy", {"weights": mask}),
        (first, "sigmoid_binary_cross_entropy", {"reduction": "sum"}),
        (both, ("softmax_cross_entropy", "squared_error"), {}),
    ],
    ids=["weights", "sum", "heads"],
)
def test_many_samples_tend_to_the_exact_fisher(model_fn, loss, options):
    params = parameters()
    exact = full(params, estimate(model_fn, loss, params, **options))

    def error(count, seed):
        found = sampled(params, model_fn, loss, count, seed, **options)
        return oracles.relative_error(found, exact)

    # Ten times less, as the root of the number of samples; a single error is a draw.
    last = error(3000, 0)
    assert last < np.mean([error(30, seed) for seed in (1, 2, 3)]) / 4
    assert last < 0.1


def test_empirical_rows_are_the_examples_own_gradients():
    params = parameters()
    targets = jnp.asarray(np.random.default_rng(1).integers(0, C, (N, T)))
    loss = "softmax_cross_entropy"
    curvature = estimate(first, loss, params, "empirical", targets, weights=mask)
    flat, unravel = ravel_pytree(params)

    def share(flat, n):
        logits = first(unravel(flat), batch())[n]
        losses = jax.nn.logsumexp(logits, -1) - logits[jnp.arange(T), targets[n]]
        return jnp.sum(losses * MASK[n]) * N / MASK.sum()

    gradients = np.stack([jax.grad(share)(flat, n) for n in range(N)])
    expected = oracles.moment(gradients)
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10


def test_padded_tokens_count_for_nothing():
    """Whatever stands at a position of weight zero, the rows are the same."""
    params, inputs = parameters(), batch()
    update, curvature = start(first, "softmax_cross_entropy", params, weights=mask)
    x = jnp.where(inputs["mask"][..., None] > 0, inputs["x"], 1e3)
    factors = [
        update(curvature, params, given).operator("body").factors()
        for given in (inputs, inputs | {"x": x})
    ]
    for one, other in zip(*factors, strict=True):
        assert oracles.relative_error(one, other) < 1e-12


def test_a_users_own_loss_needs_three_functions():
    poisson = optax_cgfac.Loss(
        name="poisson",
        value=lambda z, t: jnp.sum(jnp.exp(z) - t * z, -1),
        sample=lambda rng, z: jax.random.poisson(rng, jnp.exp(z)).astype(z.dtype),
        hessian_product=lambda z, v: jnp.exp(z) * v,
    )
    params = parameters()
    expected = dense(params, lambda z: jnp.sum(jnp.exp(z)))
    found = sampled(params, first, poisson, 3000)
    assert oracles.relative_error(found, expected) < 0.15
    with pytest.raises(
        ValueError, match=r"needs Loss.hessian_columns, which 'poisson'"
    ):
        estimate(first, poisson, params)
