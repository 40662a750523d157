"""Every wrong call is refused while it is traced, with words; right ones are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core
from flax import linen as nn

import wrong_calls
from models import normal
from optax_cgfac import cgfac, fisher_estimator
from steps import abstract_update, model_fn, value_fn
from wrong.case import given

PAGE = wrong_calls.DOCUMENT.read_text()


@pytest.mark.parametrize("case", wrong_calls.CASES, ids=lambda case: case.done)
def test_a_wrong_call_says_what_was_expected_what_came_and_what_to_do(case):
    # The same of arrays and of tracers, and nothing of either's insides.
    [(error, text)] = {case.error(traced=traced) for traced in case.ways}
    assert error in (ValueError, TypeError)  # not an error of JAX's own
    assert "Tracer" not in text
    assert wrong_calls.EXPECTED.search(text)
    assert wrong_calls.GOT.search(text)
    row = wrong_calls.row(case, error, text)  # which needs a remedy
    assert row in PAGE, "run: python tests/wrong_calls.py"


def test_there_are_many_and_no_other_lines_on_the_page():
    assert len(wrong_calls.CASES) >= 100
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) == len(wrong_calls.CASES) + len(wrong_calls.TOPICS)
    for topic in wrong_calls.TOPICS:
        assert f"\n## {topic.title}\n" in PAGE


# ---------------------------------------------------------------- what is right


def test_keys_trees_and_arrays_are_taken_in_other_forms():
    """Old keys draw as new ones do; NumPy's arrays and frozen dicts are trees."""
    g = given()
    estimator = fisher_estimator(model_fn, "squared_error", examples=4, window=2)
    curvature, run = estimator.init(g.params, g.x), jax.jit(estimator.update)
    expected = run(curvature, g.params, g.x, rng=jax.random.key(3))
    old = jax.random.PRNGKey(3)
    of_numpy = jax.tree.map(np.asarray, (g.params, g.x, old))
    for *trees, rng in ((g.params, g.x, old), of_numpy):
        found = run(curvature, *trees, rng=rng)
        jax.tree.map(np.testing.assert_array_equal, found.layers, expected.layers)
    frozen = jax.eval_shape(run, curvature, core.freeze(g.params), g.x, rng=g.key)
    assert jax.tree.structure(frozen) == jax.tree.structure(expected)


class Callable:
    """A schedule that is an object."""

    def __call__(self, count):
        return 0.1 / (1 + count)


def anything(*args, **kwargs):
    return 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(0.1, 10),
        jax.jit(lambda count: 0.1 / (1 + count)),
        functools.partial(lambda rate, count: rate, 0.1),
        functools.wraps(lambda a, b, c: None)(lambda count: 0.1),
        Callable(),
        anything,
        lambda count: 1,
        1,
        np.float32(0.5),
        np.array(0.5),
        jnp.array(0.5),
    ],
)
def test_schedules_are_functions_and_numbers_numbers_of_any_kind(schedule):
    value = 1.0 if callable(schedule) else schedule
    abstract_update(cgfac(schedule, damping=schedule), value=value)


def test_losses_may_be_methods_or_take_more_that_is_optional():
    class Trainer:
        def loss(self, params, scale=1.0):
            return scale * value_fn(params)

    for fn in (Trainer().loss, lambda params, curvature=None: value_fn(params)):
        abstract_update(cgfac(damping_interval=1), value_fn=fn)
    abstract_update(cgfac(0.1), value=None, value_fn=None)  # a rate needs no loss


def test_counts_and_parameters_of_the_fallback_may_be_integers_of_any_kind():
    fisher_estimator(model_fn, "squared_error", examples=np.int64(4), rank=np.int32(8))
    tx = cgfac(fallback=optax.set_to_zero(), where=lambda path: path != "steps")
    params = given().params | {"steps": jnp.zeros((), jnp.int32)}
    assert tx.init(params).velocity["steps"].dtype == jnp.int32


# ---------------------------------------------------------------- keys


def test_keys_are_used_once_and_layers_choose_positions_of_their_own():
    """Two layers with equal inputs of 64 positions an example."""

    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(3, name=name)(x) for name in ("one", "two"))

    x = normal(0, 8, 64, 3)
    params = jax.jit(Twins().init)(jax.random.key(1), x)["params"]
    estimator = fisher_estimator(
        lambda p, x: Twins().apply({"params": p}, x),
        "squared_error",
        examples=8,
        window=1,
    )
    curvature = estimator.init(params, x)
    run = jax.jit(lambda rng: estimator.update(curvature, params, x, rng=rng).layers)
    twice = jax.jit(lambda key: (jax.random.normal(key), jax.random.normal(key)))
    with jax.debug_key_reuse(True):  # JAX follows keys through the program
        rows = run(jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):
            twice(jax.random.key(0))
    one, two = (np.asarray(rows[name].a[:, :3], np.float32) for name in ("one", "two"))
    # Of 8 examples with 64 positions, two independent choices hardly ever agree.
    assert np.sum(np.all(one == two, -1)) <= 2
