"""Wrong calls of ``estimator.update``: inputs, targets, weights and losses."""

import jax.numpy as jnp
import numpy as np

from steps import model_fn
from wrong.calls import CONVERT, new_update, update
from wrong.case import topic
from wrong.estimator_options import own_loss

BATCHES = topic("`estimator.update`: inputs and targets", "step")
wrong = BATCHES.add
wrong(
    "inputs of another shape",
    ValueError,
    update(inputs=lambda g: g.x[:, :4]),
    r"expected: \('N', 5\)",
    r"got: +\(8, 4\)",
    "Initialise a new curvature",
)
wrong(
    "inputs of another dtype",
    ValueError,
    update(inputs=lambda g: g.x.astype(jnp.bfloat16)),
    r"had float32 at estimator\.init",
    "has dtype bfloat16",
    "Cast the inputs",
)
wrong(
    "inputs of another structure",
    ValueError,
    update(inputs=lambda g: {"x": g.x}),
    r"expected: PyTreeDef\(\*\)",
    r"got: +PyTreeDef\(\{'x': \*\}\)",
    "Pass the same tree",
)
wrong(
    "a text among the inputs",
    TypeError,
    update(inputs=lambda g: (g.x, "train")),
    "expected arrays and numbers only",
    "A leaf of inputs is 'train'",
    CONVERT,
)
wrong(
    "a smaller batch than the curvature keeps",
    ValueError,
    update(inputs=lambda g: g.x[:6]),
    "to capture examples=4 and to keep 8",
    "The batch has 6 examples",
    "Drop smaller batches",
)
wrong(
    "an empty batch",
    ValueError,
    update(inputs=lambda g: g.x[:0]),
    "The batch must hold examples",
    "got one of 0",
    "Drop empty batches",
)


wrong(
    "leaves of inputs of other numbers of examples",
    ValueError,
    new_update(
        fn=lambda p, inputs: model_fn(p, inputs[0]),
        inputs=lambda g: (g.x, g.x),
        at=lambda g: (g.x, jnp.concatenate([g.x, g.x])),
        rng=lambda g: g.key,
    ),
    "must agree on the number of examples",
    r"got \[\(8,\), \(16,\)\]",
    "Cut them to one length",
    mode="trace",
)
_DROP_TARGETS = "Drop targets= or use kind='empirical'"
wrong(
    "`targets` for `kind='mc'`",
    ValueError,
    update(targets=lambda g: g.y),
    "kind='mc' takes no targets",
    r"got a float32 array of shape \(8, 3\)",
    _DROP_TARGETS,
)
wrong(
    "`targets` for `kind='exact'`",
    ValueError,
    new_update(kind="exact", targets=lambda g: g.y),
    "kind='exact' takes no targets",
    "got a float32 array",
    _DROP_TARGETS,
    mode="trace",
)


def empirical(loss, targets, fn=model_fn):
    return new_update(fn, loss, kind="empirical", targets=targets)


BOTH = ("squared_error", "squared_error")


def both(params, x):
    return model_fn(params, x), model_fn(params, x)


for _done, _error, _call, _expected, _got, _remedy in (
    (
        "no `targets` for `kind='empirical'`",
        ValueError,
        empirical("squared_error", lambda g: None),
        "kind='empirical' needs targets",
        "got None",
        "pass targets=batch_targets",
    ),
    (
        "targets of another number of examples",
        ValueError,
        empirical("squared_error", lambda g: g.y[:7]),
        "expected the 8 examples of inputs",
        r"have shape \(7, 3\)",
        "Pass the targets of this batch",
    ),
    (
        "a list of numbers as targets",
        TypeError,
        empirical("softmax_cross_entropy", lambda g: [0] * 8),
        "targets must be arrays",
        "got 0",
        r"Pass targets=jnp\.asarray",
    ),
    (
        "texts as targets",
        TypeError,
        empirical("softmax_cross_entropy", lambda g: np.array(list("abcdefgh"))),
        "targets must be arrays of numbers",
        r"got a <U1 array of shape \(8,\)",
        r"Pass targets=jnp\.asarray",
    ),
    (
        "a tuple of targets for one output",
        TypeError,
        empirical("softmax_cross_entropy", lambda g: (g.y[:, 0].astype(int),)),
        "must be one array",
        "got tuple",
        "Pass targets=labels",
    ),
    (
        "targets of another rank",
        ValueError,
        empirical("softmax_cross_entropy", lambda g: g.y[:, :1].astype(int)),
        r"expected \(4,\) or \(4, 3\)",
        r"have shape \(4, 1\)",
        "Reshape them",
    ),
    (
        "classes as floating-point numbers",
        TypeError,
        empirical("softmax_cross_entropy", lambda g: g.y[:, 0]),
        "must be integers, the numbers of classes",
        "got dtype float32",
        r"Pass targets\.astype\(jnp\.int32\)",
    ),
    (
        "complex targets",
        TypeError,
        empirical("squared_error", lambda g: g.y + 1j),
        "must be real",
        "got dtype complex64",
        "Pass their real and imaginary parts",
    ),
    (
        "one array of targets for two outputs",
        ValueError,
        empirical(BOTH, lambda g: g.y, both),
        "targets must be a tuple of 2",
        "got a float32 array",
        "Pass targets=",
    ),
    (
        "three targets for two outputs",
        ValueError,
        empirical(BOTH, lambda g: (g.y, g.y, g.y), both),
        "targets must be a tuple of 2",
        "got tuple of 3",
        "Pass targets=",
    ),
    (
        "weights that do not fit the outputs",
        ValueError,
        new_update(weights=lambda x: x[:7, 0], rng=lambda g: g.key),
        r"broadcasts to \(N\) with N = 8",
        r"is a float32 array of shape \(7,\)",
        "Return a weight for each prediction",
    ),
    (
        "one weight for all examples",
        ValueError,
        new_update(weights=lambda x: 1.0, rng=lambda g: g.key),
        r"broadcasts to \(N\) with N = 8",
        r"weights\(inputs\) is 1\.0",
        "Return a weight for each prediction",
    ),
    (
        "`weights` that return nothing",
        ValueError,
        new_update(weights=lambda x: None, rng=lambda g: g.key),
        "must return a weight for each prediction, or for each example",
        "got None",
        r"Return inputs\['mask'\], say",
    ),
    (
        "complex weights",
        TypeError,
        new_update(weights=lambda x: x[:, 0] * 1j, rng=lambda g: g.key),
        r"weights\(inputs\) must be real numbers",
        r"got a complex64 array of shape \(8,\)",
        "Return a weight for each prediction",
    ),
    (
        "three weights for two outputs",
        ValueError,
        new_update(both, BOTH, weights=lambda x: (x[:, 0],) * 3, rng=lambda g: g.key),
        "must return one array, or a tuple of 2",
        "got 3",
        "Return a weight for each prediction",
    ),
    (
        "a loss of one's own whose `value` sums over examples",
        ValueError,
        new_update(
            loss=own_loss(value=lambda z, t: jnp.sum((z - t) ** 2)),
            rng=lambda g: g.key,
        ),
        r"expected \(4,\), one number for each prediction",
        r"value\(outputs, targets\) has shape \(\)",
        "Sum over the last axis only",
    ),
    (
        "a loss of one's own whose `hessian_columns` are transposed",
        ValueError,
        new_update(
            loss=own_loss(hessian_columns=lambda z: jnp.ones((*z.shape, 3))),
            kind="exact",
        ),
        r"expected \(3, 4, 3\)",
        r"hessian_columns\(outputs\) has shape \(4, 3, 3\)",
        "Return an array of that shape",
    ),
    (
        "`axis_name` outside of a map over such an axis",
        ValueError,
        new_update(axis_name="batch", rng=lambda g: g.key),
        "splits the batch over a named axis",
        "there is no such axis here",
        r"Call update\(\) and tx\.update\(\) inside jax\.shard_map",
    ),
):
    wrong(_done, _error, _call, _expected, _got, _remedy, mode="trace")

TOPICS = [BATCHES]
