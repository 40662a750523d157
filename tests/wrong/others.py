"""Wrong calls of everything else."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from optax_cgfac import (
    TrainState,
    cgfac,
    conjugate_gradient,
    diagnostics,
    tag_layer,
    value_and_grad,
)
from steps import MLP, model_fn
from wrong.case import Modes, Topic, of_one_pass


def loss_of(params, x, y):
    return jnp.mean((model_fn(params, x) - y) ** 2)


def one_pass(loss_fn, **options):
    return lambda g: value_and_grad(loss_fn, **options)(g.params, g.x, g.y)


SINGLE_PASS = {
    "`loss_reduction='max'`": one_pass(loss_of, loss_reduction="max"),
    "the state of an `nnx.Module` for a loss that calls a module": lambda g: (
        value_and_grad(lambda m, x: m(x).mean())(nnx.state(Modes(), nnx.Param), g.x)
    ),
    "a loss that meets no layer": one_pass(lambda p, x, y: x.mean()),
    "a loss whose `model.apply` is jitted": lambda g: one_pass(
        jax.jit(lambda p, x, y: jnp.mean(MLP().apply({"params": p}, x)))
    )(g),
}


class Tagged(nn.Module):
    """A matrix of one's own, tagged by whatever names."""

    names: dict
    cut: int = 0

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (x.shape[-1], 4))
        names = {
            role: w if name == "itself" else name for role, name in self.names.items()
        }
        return tag_layer(self, x[self.cut :], x @ w, **names)


def tagged(cut=0, **names):
    return lambda g: Tagged(names, cut).init(g.key, g.x)


TAGS = {
    "no name": tagged(),
    "a kernel and a scale": tagged(kernel="w", scale="w"),
    "a name that the module does not have": tagged(kernel="v"),
    "the parameter itself instead of its name": tagged(kernel="itself"),
    "a matrix as the scale": tagged(scale="w"),
    "inputs and outputs of other lengths": tagged(kernel="w", cut=1),
    "a number as the input": lambda g: tag_layer(Modes(), 1.0, g.x, bias="b"),
    "a Linen module that is not being applied": lambda g: tag_layer(
        MLP(), g.x, g.x, bias="b"
    ),
}

METHODS = {
    "an unknown layer in `operator`": lambda g: g.curvature.operator("Dense_7"),
    "a negative damping": lambda g: g.curvature.operator("out", damping=-1.0),
    "a form without a damping": lambda g: g.curvature.operator(
        "out", damping_form="factored"
    ),
    "all layers in one factored operator": lambda g: g.curvature.operator(None),
    "the rows of several updates in `push`": lambda g: g.curvature.push(g.curvature),
    "the rows of a smaller batch in `push`": lambda g: (
        of_one_pass(g).with_window(2).push(of_one_pass(g, 4))
    ),
}


def matvec(*, path="hidden", of=lambda g: g.params["hidden"]["kernel"], **options):
    return lambda g: g.curvature.operator(path, **options).matvec(of(g))


def solving(b=lambda g: jnp.ones((4, 3)), x0=None, **changes):
    """A solve with the last layer's operator."""

    def call(g):
        operator = g.curvature.operator("out", damping=0.1)
        start = None if x0 is None else x0(g)
        return conjugate_gradient(
            **({"operator": operator, "b": b(g), "x0": start, "max_steps": 2} | changes)
        )

    return call


class Summed:
    """An operator that returns a scalar, which broadcasts with any vector."""

    def matvec(self, vector):
        return vector.sum()


OPERATORS = {
    "integers as the right-hand side": solving(lambda g: g.x.astype(int)),
    "no array as the right-hand side": solving(lambda g: {}),
    "a matrix as the operator": solving(operator=jnp.ones((3, 3))),
    "an operator whose `matvec` returns another shape": solving(operator=Summed()),
    "a warm start of another shape": solving(x0=lambda g: g.x[0]),
}
OPERATORS_TRACED = {
    "a kernel without its bias in `matvec`": matvec(),
    "one matrix in `FullFisherOperator.matvec`": matvec(
        path=None, of=lambda g: g.x, structure="full"
    ),
    "a right-hand side of another shape than the operator": solving(lambda g: g.x),
}


def applied(**arguments):
    """A step of a state without a curvature."""

    def call(g):
        state = TrainState.create(apply_fn=model_fn, params=g.params, tx=cgfac())
        return state.apply_gradients(grads=g.grads, **arguments)

    return call


LOOKING = {
    "another optimizer's state in `diagnostics`": lambda g: diagnostics(
        optax.adam(1e-3).init(g.params)
    ),
    "two states in `diagnostics`": lambda g: diagnostics(
        [cgfac().init(g.params), cgfac().init(g.params)]
    ),
    "the loss in `extra_args` of `TrainState`": applied(extra_args={"value": 0.5}),
    "a `TrainState` without a curvature": applied(),
}

TOPICS = [
    Topic("`value_and_grad` and `check_gradients`", {}, SINGLE_PASS),
    Topic("`tag_layer`", {}, TAGS),
    Topic("`Curvature`", {}, METHODS),
    Topic("Operators and `conjugate_gradient`", OPERATORS, OPERATORS_TRACED),
    Topic("`diagnostics`, `TrainState`", LOOKING, {}),
]
