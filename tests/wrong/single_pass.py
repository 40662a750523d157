"""Wrong calls of `value_and_grad`, `check_gradients` and `tag_layer`."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import optax_cgfac
from optax_cgfac import tag_layer, value_and_grad
from steps import MLP, model_fn
from wrong.calls import INSIDE_INPUTS, Modes
from wrong.case import topic

SINGLE_PASS = topic("`value_and_grad` and `check_gradients`", "build")
wrong = SINGLE_PASS.add


def loss_of(params, x, y):
    return jnp.mean((model_fn(params, x) - y) ** 2)


def one_pass(loss_fn, *args, mode=None, **options):
    def call(g):
        given = [make(g) for make in args] if args else [g.params, g.x, g.y]
        return value_and_grad(loss_fn, **options)(*given)

    return call


for _loss_fn, _name, _got in (
    (3, "a number", "3"),
    (MLP(), "a module", "MLP"),
    (MLP, "a class", "MLP"),
):
    wrong(
        f"{_name} as `loss_fn`",
        TypeError,
        lambda g, fn=_loss_fn: value_and_grad(fn),
        r"must be a function \(params, \*args\) -> loss",
        f"got {_got}",
        "Write lambda params, x, y",
    )
wrong(
    "`loss_reduction='max'`",
    ValueError,
    lambda g: value_and_grad(loss_of, loss_reduction="max"),
    "loss_reduction must be one of 'mean', 'sum'",
    "got 'max'",
    "Pass loss_reduction=",
)
wrong(
    "`has_aux='yes'`",
    TypeError,
    lambda g: value_and_grad(loss_of, has_aux="yes"),
    "has_aux must be True or False",
    "got 'yes'",
    "Pass has_aux=",
)
wrong(
    "`num_examples=0`",
    ValueError,
    lambda g: value_and_grad(loss_of, num_examples=0),
    "num_examples must be None or an int of at least 1",
    "got 0",
    "Pass a Python int",
)
wrong(
    "a text as `where`",
    TypeError,
    lambda g: value_and_grad(loss_of, where="hidden"),
    r"where must be a function, called as where\(path\)",
    "got 'hidden'",
    "such as (lambda path: 'Dense' in path)",
)
wrong(
    "a negative tolerance of `check_gradients`",
    ValueError,
    lambda g: optax_cgfac.check_gradients(loss_of, g.params, g.x, g.y, rtol=-1.0),
    "rtol must be finite and not negative",
    "got -1.0",
    "Pass a number such as rtol=",
)
wrong(
    "`check_gradients` under `jax.jit`",
    TypeError,
    lambda g: optax_cgfac.check_gradients(loss_of, g.params, g.x, g.y),
    "must be given arrays",
    "got traced ones",
    r"Call it outside jax\.jit",
    mode="trace",
)
_HAS_AUX = "Set has_aux=True if it returns"
for _done, _error, _call, _expected, _got, _remedy in (
    (
        "a `loss_fn` that returns the losses of the examples",
        ValueError,
        one_pass(lambda p, x, y: jnp.sum((model_fn(p, x) - y) ** 2, -1)),
        "loss_fn must return a scalar",
        r"got a float32 array of shape \(8,\)",
        _HAS_AUX,
    ),
    (
        "a `loss_fn` that returns `(loss, aux)`, without `has_aux=True`",
        ValueError,
        one_pass(lambda p, x, y: (loss_of(p, x, y), x)),
        "loss_fn must return a scalar",
        "got .'a float32 array of shape",
        _HAS_AUX,
    ),
    (
        "`has_aux=True` without auxiliary outputs",
        ValueError,
        one_pass(loss_of, has_aux=True),
        r"must return a pair \(scalar, aux\)",
        r"got a float32 array of shape \(\)",
        _HAS_AUX,
    ),
    (
        "a `loss_fn` that counts errors",
        ValueError,
        one_pass(lambda p, x, y: jnp.sum(model_fn(p, x) > y)),
        "the loss a real number",
        "got an int32 array",
        _HAS_AUX,
    ),
    (
        "arguments of the loss by name",
        TypeError,
        lambda g: value_and_grad(loss_of)(g.params, x=g.x, y=g.y),
        "takes arguments by position",
        "got x, y by name",
        "Pass them in the order",
    ),
    (
        "an argument of the loss too few",
        TypeError,
        lambda g: value_and_grad(loss_of)(g.params, g.x),
        r"must be given the arguments of loss_fn, \(params, x, y\)",
        "got 2",
        "Pass the parameters first",
    ),
    (
        "integers as parameters of the loss",
        TypeError,
        one_pass(
            loss_of,
            lambda g: jax.tree.map(lambda x: x.astype(int), g.params),
            lambda g: g.x,
            lambda g: g.y,
        ),
        "must be real floating-point arrays",
        "has dtype int32",
        INSIDE_INPUTS,
    ),
    (
        "the state of an `nnx.Module`",
        TypeError,
        lambda g: value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(
            nnx.state(Modes(), nnx.Param), g.x
        ),
        r"params must be the nnx\.Module itself",
        r"got its nnx\.State",
        "Pass the module",
    ),
    (
        "a loss that meets no layer",
        ValueError,
        lambda g: value_and_grad(lambda p: jnp.sum(p["w"]))({"w": g.x}),
        r"It must call model\.apply un-jitted",
        "without meeting a layer",
        r"It must call model\.apply",
    ),
    (
        "a loss whose `model.apply` is jitted",
        ValueError,
        one_pass(
            lambda p, x, y: jnp.mean(
                jax.jit(lambda p, x: MLP().apply({"params": p}, x))(p, x)
            )
        ),
        "no curvature|without meeting a layer",
        "transform of JAX's own|traced without|was jitted",
        "Ways out:|It must call",
    ),
):
    wrong(_done, _error, _call, _expected, _got, _remedy, mode="trace")

TAGS = topic("`tag_layer`", "trace")
wrong = TAGS.add


class Tagged(nn.Module):
    """A matrix of one's own, tagged by whatever names."""

    names: dict
    cut: int = 0

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (x.shape[-1], 4))
        return tag_layer(self, x[self.cut :], x @ w, **self.names)


def tagged(cut=0, **names):
    return lambda g: Tagged(names, cut).init(g.key, g.x)


_EACH_LAYER = "Call it once for each layer"
wrong(
    "no name",
    ValueError,
    tagged(),
    r"takes kernel= \(with or without bias=\), or scale= and bias= or one of them",
    "got {'kernel': None",
    _EACH_LAYER,
)
wrong(
    "a kernel and a scale",
    ValueError,
    tagged(kernel="w", scale="w"),
    "takes kernel=",
    "got {'kernel': 'w', 'scale': 'w'",
    _EACH_LAYER,
)
wrong(
    "a name that the module does not have",
    ValueError,
    tagged(kernel="v"),
    "it has w",
    "Tagged has no parameter v",
    "Pass the name",
)
wrong(
    "a matrix as the scale",
    ValueError,
    tagged(scale="w"),
    r"the scale must have shape \(4,\)",
    r"got \(5, 4\)",
    "Pass the x and y",
)
wrong(
    "inputs and outputs of other lengths",
    ValueError,
    tagged(kernel="w", cut=1),
    "must agree on all axes but the last",
    r"got \(7, 5\) and \(8, 4\)",
    "Pass the x and y",
)

TOPICS = [SINGLE_PASS, TAGS]
