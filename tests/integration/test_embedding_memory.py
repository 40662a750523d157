"""A long vocabulary costs no more memory than its own parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr

import optax_cgfac

VOCABULARY, FEATURES, ROWS, WINDOW = 50_000, 256, 64, 8


class Tokens(nn.Module):
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, FEATURES, name="embed")
        x = nn.tanh(embed(tokens)).mean(1)
        return embed.attend(x) if self.tied else nn.Dense(7, name="out")(x)


def is_program(x):
    return isinstance(x, (ClosedJaxpr, Jaxpr))


def sizes(jaxpr):
    """The size and shape of everything a program computes, loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size, variable.aval.shape, str(equation.primitive)
        for inner in filter(is_program, jax.tree.leaves(equation.params, is_program)):
            yield from sizes(getattr(inner, "jaxpr", inner))


OPTIONS = {
    "tikhonov": {},
    "tikhonov, parameter": {"space": "parameter"},
    "factored": {"damping_form": "factored"},
    "factored, parameter": {"damping_form": "factored", "space": "parameter"},
    "factored, cg": {"damping_form": "factored", "solver": "cg"},
    "block": {"structure": "block"},
}
CASES = [(name, tied) for name in OPTIONS for tied in (False, True)]


@pytest.mark.parametrize(("name", "tied"), [c for c in CASES if c != ("block", True)])
def test_the_solve_holds_nothing_larger_than_the_parameter(name, tied):
    """R = 512 rows or more: an array of V x R would be twice the parameter."""
    tx = optax_cgfac.scale_by_cgfac(0.1, **OPTIONS[name])
    model = Tokens(tied)
    tokens = jnp.zeros((ROWS, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    estimator = optax_cgfac.fisher_estimator(
        lambda p, x: model.apply({"params": p}, x),
        "softmax_cross_entropy",
        examples=ROWS,
        window=WINDOW,
    )
    curvature = estimator.init(params, tokens)
    state = tx.init(params)

    def step(params, state, curvature, grads, rng):
        curvature = estimator.update(curvature, params, tokens, rng=rng)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return updates, state, curvature

    program = jax.make_jaxpr(step)(params, state, curvature, params, jax.random.key(0))
    found = list(sizes(program.jaxpr))
    assert any(size == VOCABULARY * FEATURES for size, *_ in found)
    largest = max(found)
    assert largest[0] <= VOCABULARY * FEATURES, largest
    held = sum(leaf.size for leaf in jax.tree.leaves(curvature.layers["embed"]))
    assert held == ROWS * WINDOW * (FEATURES + 2) * (1 + tied)
