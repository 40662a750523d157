"""Every wrong call is refused while it is traced, with words; right ones are not."""

import functools
import re

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
from steps import model_fn, update, value_fn
from wrong.case import given

PAGE = wrong_calls.DOCUMENT.read_text() if wrong_calls.DOCUMENT.exists() else ""


@pytest.mark.parametrize(
    "case", wrong_calls.CASES, ids=[case.done for case in wrong_calls.CASES]
)
def test_a_wrong_call_says_what_was_expected_what_came_and_what_to_do(case):
    messages = set()
    for traced in case.ways:
        with pytest.raises((ValueError, TypeError)) as caught:
            case.run(traced=traced)
        # An error of JAX's own may be a subclass of these.
        assert caught.type is case.error
        messages.add(str(caught.value))
    # The same of arrays and of tracers, and nothing of either's insides.
    (text,) = messages
    for part in (case.expected, case.got, case.remedy):
        assert re.search(part, text, re.DOTALL), f"{part!r} is not in\n{text}"
    assert "Tracer" not in text
    assert wrong_calls.row(case, text) in PAGE, "run: python tests/wrong_calls.py"


def test_there_are_many_and_no_other_lines_on_the_page():
    assert len(wrong_calls.CASES) >= 200
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) == len(wrong_calls.CASES) + len(wrong_calls.TOPICS)
    for topic in wrong_calls.TOPICS:
        assert f"\n## {topic.title}\n" in PAGE
        titles = [case.done for case in topic.cases]
        assert len(set(titles)) == len(titles)


# ---------------------------------------------------------------- what is right


@functools.cache
def updater(**options):
    estimator = fisher_estimator(
        model_fn, "squared_error", **({"examples": 4, "window": 2} | options)
    )
    g = given()
    return estimator.init(g.params, g.x), jax.jit(estimator.update)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_keys_of_the_old_kind_draw_as_new_ones_do():
    curvature, run = updater()
    g = given()
    new = run(curvature, g.params, g.x, rng=jax.random.key(3))
    for old in (jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        assert_equal(run(curvature, g.params, g.x, rng=old).layers, new.layers)


def test_arrays_of_numpy_and_frozen_dicts_are_trees_like_others():
    curvature, run = updater()
    g = given()
    expected = run(curvature, g.params, g.x, rng=g.key)
    of_numpy = jax.tree.map(np.asarray, (g.params, g.x))
    assert_equal(run(curvature, *of_numpy, rng=g.key).layers, expected.layers)
    frozen = jax.eval_shape(run, curvature, core.freeze(g.params), g.x, rng=g.key)
    assert jax.tree.structure(frozen) == jax.tree.structure(expected)


def abstract_step(tx, **changes):
    """The shapes of an update, without compiling it."""
    g = given()

    def call(g, state):
        extra = {"curvature": g.curvature, "value": g.value, "value_fn": value_fn}
        return tx.update(g.grads, state, g.params, **(extra | changes))

    return jax.eval_shape(call, g, tx.init(g.params))


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
        lambda count: np.float32(0.1),
    ],
    ids=["optax", "jit", "partial", "wraps", "object", "any", "int", "numpy"],
)
def test_schedules_are_functions_of_any_kind(schedule):
    abstract_step(cgfac(schedule, damping=schedule))


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_numbers_are_numbers_of_any_kind(number):
    abstract_step(cgfac(number, damping=number), value=number)


def test_counts_are_integers_of_any_kind():
    fisher_estimator(model_fn, "squared_error", examples=np.int64(4), rank=np.int32(8))


def test_losses_may_be_methods_or_take_more_that_is_optional():
    class Trainer:
        def loss(self, params, scale=1.0):
            return scale * value_fn(params)

    abstract_step(cgfac(damping_interval=1), value_fn=Trainer().loss)
    abstract_step(
        cgfac(damping_interval=1), value_fn=lambda p, curvature=None: value_fn(p)
    )


def test_a_rate_needs_no_loss():
    updates, _ = update(cgfac(0.1), cgfac(0.1).init(given().params))
    assert np.any(updates["out"]["kernel"])
    abstract_step(cgfac(0.1), value=None, value_fn=None)


def test_integers_may_be_left_to_a_fallback():
    """What CG-FAC does not train need not be real."""
    tx = cgfac(fallback=optax.set_to_zero(), where=lambda path: path != "steps")
    params = given().params | {"steps": jnp.zeros((), jnp.int32)}
    assert tx.init(params).velocity["steps"].dtype == jnp.int32


# ---------------------------------------------------------------- keys


class Sampled(nn.Module):
    """Layers that all choose among the same number of positions."""

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = nn.tanh(nn.Dense(3, name=f"layer_{index}")(x))
        return x


LONG = normal(0, 8, 64, 3)


def sampled_update(**options):
    model = Sampled()
    params = jax.jit(model.init)(jax.random.key(1), LONG)["params"]
    estimator = fisher_estimator(
        lambda p, x: model.apply({"params": p}, x),
        "squared_error",
        examples=8,
        window=1,
        **options,
    )
    curvature = estimator.init(params, LONG)
    return jax.jit(
        lambda rng: estimator.update(curvature, params, LONG, rng=rng).layers
    )


def test_no_key_is_used_twice():
    """By JAX's own account, which follows keys through the program."""
    run = sampled_update()
    twice = jax.jit(lambda key: (jax.random.normal(key), jax.random.normal(key)))
    with jax.debug_key_reuse(True):
        run(jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):
            twice(jax.random.key(0))


def test_layers_choose_positions_of_their_own():
    """By the position that each input row came from, for layers with equal inputs."""

    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(3, name=name)(x) for name in ("one", "two"))

    params = jax.jit(Twins().init)(jax.random.key(1), LONG)["params"]
    estimator = fisher_estimator(
        lambda p, x: Twins().apply({"params": p}, x),
        "squared_error",
        examples=8,
        window=1,
    )
    curvature = estimator.init(params, LONG)
    rows = jax.jit(estimator.update)(curvature, params, LONG, rng=given().key).layers
    one, two = (np.asarray(rows[name].a[:, :3], np.float32) for name in ("one", "two"))
    # Of 8 examples with 64 positions, two independent choices hardly ever agree.
    assert np.sum(np.all(one == two, -1)) <= 2
