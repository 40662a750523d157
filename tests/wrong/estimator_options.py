"""Wrong options of `fisher_estimator` and `Loss`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_cgfac import Loss, fisher_estimator
from steps import MLP, model_fn
from wrong.case import topic


def estimating(loss="squared_error", fn=model_fn, **options):
    return lambda g: fisher_estimator(fn, loss, **options)


HESSIAN_LESS = {
    "value": lambda z, t: jnp.sum((z - t) ** 2, -1),
    "sample": lambda rng, z: z + jax.random.normal(rng, z.shape),
    "hessian_product": lambda z, v: 2 * v,
}


def own_loss(**changes):
    return Loss(**{"name": "own", **HESSIAN_LESS, **changes})


OPTIONS = topic("`fisher_estimator`: its options", "build")
wrong = OPTIONS.add
_MODULE = "For a module write"
wrong(
    "a number as `model_fn`",
    TypeError,
    estimating(fn=3),
    r"must be a function \(params, inputs\) -> outputs",
    "got 3",
    _MODULE,
)
wrong(
    "a Linen module as `model_fn`",
    TypeError,
    estimating(fn=MLP()),
    "must be a function",
    "got MLP",
    _MODULE,
)
wrong(
    "an NNX module as `model_fn`",
    TypeError,
    lambda g: fisher_estimator(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "squared_error"),
    "must be a function",
    "got Linear",
    _MODULE,
)
wrong(
    "a module's class as `model_fn`",
    TypeError,
    estimating(fn=MLP),
    "must be a function",
    "got MLP",
    _MODULE,
)
wrong(
    "a `model_fn` of the parameters only",
    TypeError,
    estimating(fn=lambda params: params),
    "must be a function",
    r"got one of \(params\)",
    "Put all that the model takes",
)
wrong(
    "a `model_fn` of three arguments",
    TypeError,
    estimating(fn=lambda params, x, mask: x),
    "must be a function",
    r"got one of \(params, x, mask\)",
    "Put all that the model takes",
)
wrong(
    "an unknown loss",
    ValueError,
    estimating("mse"),
    "Names: softmax_cross_entropy",
    "loss 'mse'",
    "For any other loss pass",
)
wrong(
    "a function as the loss",
    TypeError,
    estimating(optax.squared_error),
    r"must be a name or an optax_cgfac\.Loss",
    "got function",
    "Pass one of the names",
)
wrong(
    "no loss",
    TypeError,
    estimating(None),
    "must be a name or",
    "got None",
    "Pass one of the names",
)
wrong(
    "an empty tuple of losses",
    ValueError,
    estimating(()),
    "a tuple of them",
    "got an empty tuple",
    "Pass a loss for each output",
)
wrong(
    "a tuple of losses that holds something else",
    TypeError,
    estimating(("squared_error", 3)),
    "must be a name or",
    "got int",
    "Pass one of the names",
)
for _option, _value, _choices in (
    ("kind", "fisher", "'mc', 'empirical', 'exact'"),
    ("kind", 3, "'mc', 'empirical', 'exact'"),
    ("weight_sharing", "sum", "'expand', 'reduce'"),
    ("reduction", "none", "'mean', 'mean_of_sums', 'sum'"),
):
    wrong(
        f"`{_option}={_value!r}`",
        ValueError,
        estimating(**{_option: _value}),
        f"{_option} must be one of {_choices}",
        f"got {_value!r}",
        f"Pass {_option}=",
    )
for _option, _value, _got in (
    ("window", 0, "0"),
    ("window", 2.0, "2.0"),
    ("examples", -4, "-4"),
    ("examples", True, "True"),
    ("examples", np.ones(1, int), r"an int64 array of shape \(1,\)"),
    ("model_examples", 1.5, "1.5"),
    ("samples", "2", "'2'"),
    ("refresh_every", None, "None"),
    ("capture_every", 0, "0"),
    ("positions", -1, "-1"),
    ("rank", 0, "0"),
    ("rank", "all", "'all'"),
):
    wrong(
        f"`{_option}={_value!r}`",
        ValueError,
        estimating(**{_option: _value}),
        f"{_option} must be .*an int of at least 1",
        f"got {_got}",
        f"Pass a Python int such as {_option}=8",
    )
wrong(
    "more than one sample of another kind than `mc`",
    ValueError,
    estimating(kind="exact", samples=2),
    "samples=2 needs kind='mc'",
    "got kind='exact'",
    "Drop samples=",
)
wrong(
    "`kind='exact'` with a loss that has no `hessian_columns`",
    ValueError,
    lambda g: fisher_estimator(model_fn, own_loss(), kind="exact"),
    r"needs Loss\.hessian_columns",
    "which 'own' lacks",
    "Pass one with hessian_columns",
)
wrong(
    "a text as `where`",
    TypeError,
    estimating(where="Dense"),
    r"where must be a function, called as where\(path\), such as lambda path: 'Dense'",
    "got 'Dense'",
    "such as (lambda path: 'Dense' in path)",
)
wrong(
    "a `where` without an argument",
    TypeError,
    estimating(where=lambda: True),
    r"called as where\(path\)",
    r"got one of \(\)",
    "such as (lambda path: 'Dense' in path)",
)
wrong(
    "an optimizer as the estimator's `fallback`",
    TypeError,
    lambda g: fisher_estimator(model_fn, "squared_error", fallback=optax.adam(1e-3)),
    "fallback must be True or False",
    "got GradientTransformation",
    r"Pass fallback=True .*cgfac\(fallback=",
)
wrong(
    "`whole_batch=1`",
    TypeError,
    estimating(whole_batch=1),
    "whole_batch must be True or False",
    "got 1",
    "Pass whole_batch=True",
)
wrong(
    "`input_axes='all'`",
    ValueError,
    estimating(input_axes="all"),
    "must be 'auto' or a pytree prefix of inputs with 0 and None",
    "got 'all'",
    "Pass {'x': 0",
)
for _axis in (1, False, "x"):
    wrong(
        f"`{_axis!r}` in `input_axes`",
        ValueError,
        estimating(input_axes={"x": _axis}),
        "input_axes takes 0 and None",
        f"got {_axis!r}",
        "Bring examples to the first axis",
    )
for _dtype in ("int32", "complex64"):
    wrong(
        f"`rows_dtype={_dtype!r}`",
        ValueError,
        estimating(rows_dtype=_dtype),
        "must be a floating-point dtype",
        f"got {_dtype}",
        "Pass rows_dtype='float32'",
    )
wrong(
    "`rows_dtype='halves'`",
    TypeError,
    estimating(rows_dtype="halves"),
    "must be a floating-point dtype",
    "got 'halves'",
    "Pass rows_dtype='float32'",
)
wrong(
    "a text as `weights`",
    TypeError,
    estimating(weights="mask"),
    r"weights must be a function, called as weights\(inputs\)",
    "got 'mask'",
    r"such as (lambda inputs: inputs\['mask'\])",
)
wrong(
    "`weights` of two arguments",
    TypeError,
    estimating(weights=lambda params, inputs: inputs),
    r"called as weights\(inputs\)",
    r"got one of \(params, inputs\)",
    r"such as (lambda inputs: inputs\['mask'\])",
)
wrong(
    "a number as `axis_name`",
    TypeError,
    estimating(axis_name=0),
    "must be the name of a mesh axis",
    "got 0",
    "Pass axis_name='batch'",
)

LOSS = topic("`Loss`", "build")
wrong = LOSS.add
for _field, _value, _error, _expected, _remedy in (
    ("weight", -1.0, ValueError, "be finite and not negative", "Pass a number such"),
    ("weight", np.nan, ValueError, "be finite and not negative", "Pass a number such"),
    ("weight", "big", TypeError, "be a plain number", "Pass a float such as weight"),
    ("lower_bound", "zero", TypeError, "be a number", "Pass a number such as"),
    ("lower_bound", -np.inf, ValueError, "be finite", "Pass a number such as"),
    ("name", None, TypeError, "be a text", "Pass name="),
):
    wrong(
        f"`Loss({_field}={_value!r})`",
        _error,
        lambda g, field=_field, value=_value: own_loss(**{field: value}),
        f"Loss.{_field} must {_expected}",
        f"got {_value!r}",
        _remedy,
    )
wrong(
    "an array as the weight of a loss",
    TypeError,
    lambda g: own_loss(weight=np.ones(2)),
    "must be a plain number",
    r"got a float64 array of shape \(2,\)",
    "Pass a float such as weight",
)
wrong(
    "a loss without a function to sample",
    TypeError,
    lambda g: own_loss(sample=None),
    r"Loss\.sample must be a function, called as Loss\.sample\(rng, outputs\)",
    "got None",
    "such as (lambda rng, outputs: ...)",
)
wrong(
    "a loss whose `value` takes the outputs only",
    TypeError,
    lambda g: own_loss(value=lambda z: z),
    r"called as Loss\.value\(outputs, targets\)",
    r"got one of \(z\)",
    "such as (lambda outputs, targets: ...)",
)
wrong(
    "an unknown name in `Loss.named`",
    ValueError,
    lambda g: Loss.named("mse", weight=0.1),
    "Names: softmax_cross_entropy",
    "loss 'mse'",
    "For any other loss pass",
)

TOPICS = [OPTIONS, LOSS]
