"""What is refused, and whether the message says what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_cgfac
from models import BATCH, Compact, init
from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac, value_and_grad
from steps import TRANSFORMS, ingredients, problem, value_fn

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def call(tx, params=True, **arguments):
    given = ingredients()
    state = tx.init(given.params)
    return tx.update(given.grads, state, given.params if params else None, **arguments)


@every_transform
def test_a_missing_curvature_shows_the_call_to_make(name):
    with pytest.raises(ValueError, match="needs the curvature of this step") as error:
        call(TRANSFORMS[name]())
    message = str(error.value)
    for part in (
        "curvature = estimator.update(curvature, params, inputs, rng=rng)",
        "curvature=curvature",
        "value_fn=lambda p: loss_fn(p, batch)",
        "missing='gradient'",
    ):
        assert part in message


@every_transform
def test_something_else_than_a_curvature_is_refused(name):
    with pytest.raises(TypeError, match=r"must be an optax_cgfac.Curvature.*got dict"):
        call(TRANSFORMS[name](), curvature={})


@every_transform
def test_another_models_curvature_is_refused(name):
    params = init(Compact(), BATCH)
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: Compact().apply({"params": p}, x), "squared_error", rows=4
    )
    curvature = estimator.init(params, BATCH)
    with pytest.raises(ValueError, match=r"another\s+model|of this model"):
        call(TRANSFORMS[name](), curvature=curvature, value=0.0, value_fn=value_fn)


@every_transform
def test_layers_of_another_width_are_refused(name):
    given = ingredients()
    tx = TRANSFORMS[name]()
    wide = given.params | {"out": {"kernel": jnp.ones((4, 7))}}
    with pytest.raises(ValueError, match=r"'out/kernel' has shape \(4, 7\)"):
        tx.update(
            wide,
            tx.init(wide),
            wide,
            curvature=given.curvature,
            value=0.0,
            value_fn=value_fn,
        )


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ({}, "value and value_fn"),
        ({"value": 0.0}, "value_fn"),
        ({"value_fn": value_fn}, "value"),
    ],
)
def test_without_a_rate_value_and_value_fn_are_needed(arguments, absent):
    with pytest.raises(ValueError, match=rf"needs {absent}:\n.*tx.update"):
        call(cgfac(), curvature=ingredients().curvature, **arguments)


def test_with_a_rate_they_are_not():
    updates, _ = call(cgfac(0.1), curvature=ingredients().curvature)
    assert jnp.any(updates["out"]["kernel"] != 0)


def test_cgfac_needs_the_parameters():
    with pytest.raises(ValueError, match="needs the parameters"):
        call(cgfac(0.1), params=False, curvature=ingredients().curvature)


def test_the_single_pass_has_no_model_to_choose_a_step_with():
    p = problem()
    _, _, curvature = value_and_grad(p.loss)(p.params, p.batch)
    with pytest.raises(ValueError, match=r"value_and_grad pass cgfac\(learning_rate="):
        call(cgfac(), curvature=curvature, value=0.0, value_fn=value_fn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cgfac(kl_clip=1e-3), "kl_clip needs a learning_rate"),
        (lambda: cgfac(damping=lambda count: 0.1), "Without a learning_rate"),
        (lambda: cgfac(0.1, l2=-1.0), "l2 must be finite and not negative, got -1"),
        (lambda: cgfac(0.1, momentum=-1.0), "momentum must be finite and not negative"),
        (lambda: cgfac(0.1, kl_clip=-1.0), "kl_clip must be finite and not negative"),
        (lambda: cgfac(float("nan")), "learning_rate must be finite and not negative"),
        (
            lambda: cgfac(-0.1),
            "learning_rate must be finite and not negative, got -0.1",
        ),
        (lambda: cgfac(0.1, l2=float("nan")), "l2 must be finite and not negative"),
        (lambda: cgfac(damping_decay=1.0), r"damping_decay must lie in \(0, 1\)"),
        (lambda: cgfac(damping_interval=0), "damping_interval must be an int"),
        (lambda: cgfac(min_damping=2.0, max_damping=1.0), "min_damping <= max_damping"),
        (lambda: cgfac(damping=1e9, max_damping=1e4), "initial damping must lie in"),
        (lambda: cgfac(fallback=optax.sgd(0.1)), "fallback needs where="),
        (lambda: cgfac(missing="ignore"), "missing must be 'raise' or 'gradient'"),
        (lambda: scale_by_cgfac(-0.1), "damping must be finite and not negative"),
        (lambda: scale_by_cgfac(float("nan")), "damping must be finite"),
        (lambda: scale_by_cgfac(0.1, structure="tri"), "structure must be one of"),
        (lambda: scale_by_cgfac(0.1, space="rows"), "space must be one of 'auto'"),
        (lambda: scale_by_cgfac(0.1, solver="lu"), "solver must be one of"),
        (lambda: scale_by_cgfac(0.1, solver="cholesky"), "does not separate"),
        (lambda: scale_by_cgfac(0.1, max_steps=0), "max_steps must be an int"),
        (lambda: scale_by_cgfac(0.1, rtol=1.0), r"rtol must lie in \[0, 1\)"),
        (
            lambda: scale_by_cgfac(0.1, preconditioner="jacobi"),
            "needs space='parameter'",
        ),
        (lambda: scale_by_kfac(0.1, damping_form="both"), "damping_form must be one"),
        (lambda: scale_by_kfac(0.1, missing="x"), "missing must be 'raise'"),
    ],
)
def test_bad_options_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def adaptive(**extra):
    given = {"curvature": ingredients().curvature, "value": 1.0, "value_fn": value_fn}
    return call(cgfac(damping_interval=1), **(given | extra))


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"value_fn": 3.0}, TypeError, "value_fn must be a function .*got float"),
        ({"value": jnp.ones(3)}, ValueError, r"scalar loss .* got shape \(3,\)"),
        (
            {"value_fn": lambda p: (jnp.zeros(()), {})},
            ValueError,
            r"value_fn must return the scalar loss.*\[0\]",
        ),
        (
            {"value_fn": lambda p: jnp.zeros(3)},
            ValueError,
            "value_fn must return the scalar loss",
        ),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(extra, error, message):
    with pytest.raises(error, match=message):
        adaptive(**extra)


@pytest.mark.parametrize("make", [cgfac, scale_by_cgfac], ids=["cgfac", "scale_by"])
def test_gradients_of_integers_are_refused(make):
    given = ingredients()
    tx = make(0.1)
    grads = jax.tree.map(lambda g: g.astype(jnp.int32), given.grads)
    with pytest.raises(TypeError, match="has dtype int32; expected a real"):
        tx.update(grads, tx.init(given.params), given.params, curvature=given.curvature)
