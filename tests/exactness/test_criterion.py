"""Reductions, weights, several outputs and samples against the dense Gauss-Newton."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import optax_cgfac
import oracles
from optax_cgfac.optimize.quadratic_model import gauss_newton_products
from optax_cgfac.utils.paths import leaves_by_path

N, T, C = 5, 3, 2


class Heads(nn.Module):
    """A classifier for each position, and one number for the whole example."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, param_dtype=x.dtype, name="body")(x))
        per_position = nn.Dense(C, param_dtype=x.dtype, name="class")(x)
        return per_position, nn.Dense(1, param_dtype=x.dtype, name="size")(x.mean(1))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


MODEL = Heads()
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], float)
BATCH = {"x": normal(N, T, 3), "mask": jnp.asarray(MASK)}


def both(params, inputs):
    return MODEL.apply({"params": params}, inputs["x"])


def first(params, inputs):
    return both(params, inputs)[0]


def parameters():
    params = MODEL.init(jax.random.key(0), BATCH["x"])["params"]
    return jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)


def hessian(loss, z):
    return np.asarray(jax.hessian(loss)(z))


def dense(params, model_fn, head, loss, factors):
    """``1/N Σ factor_nt Jᵀ H J`` over the raveled parameters."""
    flat, unravel = ravel_pytree(params)

    def outputs(flat):
        out = model_fn(unravel(flat), BATCH)
        out = out[head] if isinstance(out, tuple) else out
        return out.reshape(-1, out.shape[-1])

    jacobian = np.asarray(jax.jacrev(outputs)(flat))
    total = np.zeros((flat.size, flat.size))
    for j, z, factor in zip(jacobian, outputs(flat), np.ravel(factors), strict=True):
        total += factor * j.T @ hessian(loss, z) @ j
    return total / N


def softmax(z):
    return jax.nn.logsumexp(z)


def squared(z):
    return jnp.sum(z**2)


def estimate(model_fn, loss, params, kind="exact", rng=None, targets=None, **options):
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
    curvature = estimator.init(params, BATCH)
    return estimator.update(curvature, params, BATCH, rng=rng, targets=targets)


def full(params, curvature):
    """The full Fisher over the raveled parameters, zero where uncovered."""
    flat, unravel = ravel_pytree(params)
    numbered = leaves_by_path(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    places = []
    for tag in curvature.tags:
        kernel, bias = (np.asarray(numbered[path], int) for path in tag.leaves)
        places.append(np.vstack([kernel, bias]).ravel())
    places = np.concatenate(places)
    result = np.zeros((flat.size, flat.size))
    operator = curvature.operator(None, structure="full")
    result[np.ix_(places, places)] = operator.to_dense()
    return result


FACTORS = {
    ("mean", False): np.full((N, T), 1 / T),
    ("mean_of_sums", False): np.ones((N, T)),
    ("sum", False): np.full((N, T), float(N)),
    ("mean", True): MASK * N / MASK.sum(),
    ("mean_of_sums", True): MASK,
    ("sum", True): MASK * N,
}


def mask(inputs):
    return inputs["mask"]


@pytest.mark.parametrize(("reduction", "weighted"), FACTORS)
def test_the_fisher_of_every_reduction_and_weight(reduction, weighted, x64):
    params = parameters()
    options = {"reduction": reduction, "weights": mask if weighted else None}
    curvature = estimate(first, "softmax_cross_entropy", params, **options)
    factors = FACTORS[reduction, weighted]
    expected = dense(params, first, 0, softmax, factors)
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10
    vectors = [
        jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in (1, 2)
    ]
    flat = np.stack([ravel_pytree(v)[0] for v in vectors])
    products = gauss_newton_products(curvature, params, vectors)
    assert oracles.relative_error(products, flat @ expected @ flat.T) < 1e-10


def test_outputs_with_a_loss_each_add_up(x64):
    params = parameters()
    losses = (
        "softmax_cross_entropy",
        optax_cgfac.Loss.named("squared_error", weight=0.3),
    )
    curvature = estimate(both, losses, params)
    expected = dense(params, both, 0, softmax, FACTORS["mean", False])
    expected += 0.3 * dense(params, both, 1, squared, np.ones(N))
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10
    vectors = [
        jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in (1, 2)
    ]
    flat = np.stack([ravel_pytree(v)[0] for v in vectors])
    products = gauss_newton_products(curvature, params, vectors)
    assert oracles.relative_error(products, flat @ expected @ flat.T) < 1e-10


@pytest.mark.parametrize(
    ("model_fn", "loss", "options"),
    [
        (first, "softmax_cross_entropy", {"weights": mask}),
        (first, "sigmoid_binary_cross_entropy", {"reduction": "sum"}),
        (both, ("softmax_cross_entropy", "squared_error"), {}),
    ],
    ids=["weights", "sum", "heads"],
)
def test_many_samples_tend_to_the_exact_fisher(model_fn, loss, options, x64):
    params = parameters()
    exact = full(params, estimate(model_fn, loss, params, **options))

    def error(samples, seed):
        curvature = estimate(
            model_fn,
            loss,
            params,
            "mc",
            jax.random.key(seed),
            samples=samples,
            **options,
        )
        assert curvature.tags[0].columns == samples
        return oracles.relative_error(full(params, curvature), exact)

    # Ten times less, as the root of the number of samples; a single error is a draw.
    last = error(3000, 0)
    assert last < np.mean([error(30, seed) for seed in (1, 2, 3)]) / 4
    assert last < 0.1


def test_empirical_rows_are_the_examples_own_gradients(x64):
    params = parameters()
    targets = jnp.asarray(np.random.default_rng(1).integers(0, C, (N, T)))
    curvature = estimate(
        first,
        "softmax_cross_entropy",
        params,
        "empirical",
        targets=targets,
        weights=mask,
    )
    flat, unravel = ravel_pytree(params)

    def share(flat, n):
        logits = first(unravel(flat), BATCH)[n]
        losses = jax.nn.logsumexp(logits, -1) - logits[jnp.arange(T), targets[n]]
        return jnp.sum(losses * MASK[n]) * N / MASK.sum()

    gradients = np.stack([jax.grad(share)(flat, n) for n in range(N)])
    expected = gradients.T @ gradients / N
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10


def test_smoothed_labels_have_the_same_gauss_newton_matrix(x64):
    """The Hessian of the cross-entropy does not depend on its targets."""
    params = parameters()

    def smoothed(z):
        labels = jnp.array([0.9, 0.1])
        return -jnp.sum(labels * jax.nn.log_softmax(z))

    expected = dense(params, first, 0, smoothed, FACTORS["mean", False])
    curvature = estimate(first, "softmax_cross_entropy", params)
    assert oracles.relative_error(full(params, curvature), expected) < 1e-10


def test_padded_tokens_count_for_nothing(x64):
    """Whatever stands at a position of weight zero, the rows are the same."""
    params = parameters()
    other = jnp.where(BATCH["mask"][..., None] > 0, BATCH["x"], 1e3)
    estimator = optax_cgfac.fisher_estimator(
        first,
        "softmax_cross_entropy",
        examples=N,
        positions=None,
        weights=mask,
        fallback=True,
    )
    factors = []
    for x in (BATCH["x"], other):
        inputs = BATCH | {"x": x}
        curvature = estimator.init(params, inputs)
        curvature = estimator.update(curvature, params, inputs, rng=jax.random.key(3))
        factors.append(curvature.operator("body").factors())
    for one, another in zip(*factors, strict=True):
        assert oracles.relative_error(one, another) < 1e-12


def test_a_users_own_loss_needs_three_functions(x64):
    poisson = optax_cgfac.Loss(
        name="poisson",
        value=lambda z, t: jnp.sum(jnp.exp(z) - t * z, -1),
        sample=lambda rng, z: jax.random.poisson(rng, jnp.exp(z)).astype(z.dtype),
        hessian_product=lambda z, v: jnp.exp(z) * v,
    )
    params = parameters()
    curvature = estimate(first, poisson, params, "mc", jax.random.key(0), samples=3000)
    expected = dense(
        params, first, 0, lambda z: jnp.sum(jnp.exp(z)), FACTORS["mean", False]
    )
    assert oracles.relative_error(full(params, curvature), expected) < 0.15
    with pytest.raises(
        ValueError, match=r"needs Loss.hessian_columns, which 'poisson'"
    ):
        estimate(first, poisson, params)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"broadcasts to \(N, 3\)"):
        estimate(
            first,
            "softmax_cross_entropy",
            parameters(),
            weights=lambda inputs: inputs["mask"][:, :2],
        )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (jnp.zeros((N - 1, T), int), f"expected the {N} examples"),
        (jnp.zeros((N, T, 1), int), r"have shape \(5, 3, 1\); expected \(5, 3\) or"),
    ],
)
def test_targets_of_another_shape_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        estimate(
            first, "softmax_cross_entropy", parameters(), "empirical", targets=targets
        )
