"""Wrong calls of an estimator's functions, of `value_and_grad` and of `tag_layer`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import optax_cgfac
from optax_cgfac import fisher_estimator, tag_layer, value_and_grad
from steps import MLP, model_fn, problem
from wrong_case import topic
from wrong_estimator_options import own_loss

INIT = topic("`estimator.init`", "step")
wrong = INIT.add


def init(params=None, inputs=None, fn=model_fn, loss="squared_error", **options):
    """``init`` with parameters or inputs made from the right ones."""

    def call(g):
        estimator = fisher_estimator(fn, loss, **({"rows": 4} | options))
        return estimator.init(
            g.params if params is None else params(g),
            g.x if inputs is None else inputs(g),
        )

    return call


_PASS_TREE = "Pass the tree of parameters"
wrong(
    "`None` as the parameters",
    ValueError,
    init(lambda g: None),
    "params has no leaves",
    r"\(got None\)",
    _PASS_TREE,
)
wrong(
    "an empty dict as the parameters",
    ValueError,
    init(lambda g: {}),
    "params has no leaves",
    r"\(got dict\)",
    _PASS_TREE,
)
wrong(
    "the inputs before the parameters",
    TypeError,
    init(lambda g: g.x, lambda g: g.params),
    "must be a tree of named parameters",
    r"got a float32 array of shape \(8, 5\)",
    "Pass the parameters first",
)
_INSIDE_INPUTS = "Pass counters and statistics inside inputs"
for _dtype in ("int32", "bool", "complex64"):
    wrong(
        f"a parameter of dtype {_dtype}",
        TypeError,
        init(lambda g, dtype=_dtype: g.params | {"steps": np.zeros(3, dtype)}),
        "parameters must be real floating-point arrays",
        f"'steps' has dtype {_dtype}",
        _INSIDE_INPUTS,
    )
wrong(
    "a key among the parameters",
    TypeError,
    init(lambda g: g.params | {"rng": g.key}),
    "parameters must be real floating-point arrays",
    "'rng' has dtype key",
    _INSIDE_INPUTS,
)
for _leaf in (0.5, "relu"):
    wrong(
        f"`{_leaf!r}` among the parameters",
        TypeError,
        init(lambda g, leaf=_leaf: g.params | {"slope": leaf}),
        "expected an array",
        f"'slope' is {_leaf!r}",
        "Convert numbers by jax.tree.map",
    )
_CONVERT = r"Convert it by jnp\.asarray"
for _name, _leaf, _got in (
    ("a text", "train", "'train'"),
    ("a function", np.sin, "ufunc"),
    ("an array of objects", np.array([None, {}]), "an object array"),
):
    wrong(
        f"{_name} among the inputs",
        TypeError,
        init(inputs=lambda g, leaf=_leaf: {"x": g.x, "mode": leaf}),
        "expected arrays and numbers only",
        f"A leaf of inputs is {_got}",
        _CONVERT,
    )
wrong(
    "an empty batch",
    ValueError,
    init(inputs=lambda g: g.x[:0]),
    "The batch must hold examples",
    "got one of 0",
    "Drop empty batches",
)
wrong(
    "fewer examples than `rows`",
    ValueError,
    init(inputs=lambda g: g.x[:3]),
    "rows=4 examples are captured",
    "the inputs hold 3",
    r"Pass fisher_estimator\(\.\.\., rows=3\)",
)
_PREDICTIONS = "Return predictions and not the loss"
wrong(
    "a `model_fn` that returns the loss",
    ValueError,
    init(fn=lambda p, x: model_fn(p, x).sum()),
    r"model_fn must return one array of shape \(N, \.\.\., C\)",
    r"got a float32 array of shape \(\)",
    _PREDICTIONS,
)
wrong(
    "a `model_fn` that returns one number for each example",
    ValueError,
    init(fn=lambda p, x: model_fn(p, x)[:, 0]),
    "examples first and one prediction on the last axis",
    r"got a float32 array of shape \(8,\)",
    _PREDICTIONS,
)
wrong(
    "a `model_fn` that returns classes",
    TypeError,
    init(fn=lambda p, x: model_fn(p, x).argmax(-1)[:, None]),
    "must return real floating-point predictions",
    r"got an int32 array of shape \(8, 1\)",
    "Return logits",
)
wrong(
    "a `model_fn` that returns complex numbers",
    TypeError,
    init(fn=lambda p, x: model_fn(p, x) + 1j),
    "must return real floating-point predictions",
    "got a complex64 array",
    "Return logits",
)
_FOR_SEVERAL = "For several outputs pass a tuple of losses"
wrong(
    "a `model_fn` that returns updated statistics too",
    ValueError,
    init(fn=lambda p, x: (model_fn(p, x), {})),
    "must return one array",
    r"got PyTreeDef\(\(\*, \{\}\)\)",
    _FOR_SEVERAL,
)
wrong(
    "a tuple of losses for one output",
    ValueError,
    init(loss=("squared_error", "squared_error")),
    "must return a tuple of 2",
    r"got PyTreeDef\(\*\)",
    _FOR_SEVERAL,
)
wrong(
    "two outputs of other numbers of examples",
    ValueError,
    init(
        fn=lambda p, x: (model_fn(p, x), model_fn(p, x)[:4]),
        loss=("squared_error", "squared_error"),
    ),
    "must agree on the number of examples",
    r"got shapes \[\(8, 3\), \(4, 3\)\]",
    "Bring the batch to the first axis",
)
wrong(
    "outputs whose first axis is not the batch",
    ValueError,
    init(fn=lambda p, x: model_fn(p, x).T[:2], rows=2),
    "have 2 examples on their first axis",
    r"shapes of inputs: \[\(8, 5\)\]",
    "The first axis of inputs and outputs must be the batch",
)
wrong(
    "`input_axes` that is no prefix of the inputs",
    ValueError,
    init(
        inputs=lambda g: {"x": g.x, "scale": g.x[0]},
        fn=lambda p, inputs: model_fn(p, inputs["x"]),
        input_axes=(0, None),
    ),
    r"expected: a prefix of PyTreeDef\(\{'scale': \*, 'x': \*\}\)",
    r"got: +\(0, None\)",
    "Write 0 or None in the place of every leaf",
)
wrong(
    "`input_axes` 0 for a leaf without examples",
    ValueError,
    init(
        inputs=lambda g: {"x": g.x, "scale": g.x[0]},
        fn=lambda p, inputs: model_fn(p, inputs["x"]),
        input_axes=0,
    ),
    "the outputs have 8 examples on their first axis",
    r"with input_axes 0 has shape \(5,\)",
    "Write None for it",
)
wrong(
    "a `where` that is false for all parameters",
    ValueError,
    init(where=lambda path: "Dense" in path),
    "where must be true for the parameters to precondition",
    "got false for all of them: hidden/bias, hidden/kernel, out/kernel",
    "Test for a part of such a path",
)
_WAYS_OUT = "Ways out:"
wrong(
    "a `where` that leaves out a kernel and keeps its bias",
    ValueError,
    init(where=lambda path: path != "hidden/kernel"),
    "1 parameters have no curvature",
    "hidden/bias: where leaves its kernel 'hidden/kernel' out",
    _WAYS_OUT,
)
wrong(
    "a parameter that no layer reads",
    ValueError,
    init(lambda g: g.params | {"old": {"kernel": g.x}}),
    "1 parameters have no curvature",
    "old/kernel: no module that reads it was met",
    _WAYS_OUT,
)
wrong(
    "a `model_fn` that is jitted",
    ValueError,
    init(fn=jax.jit(lambda p, x: MLP().apply({"params": p}, x))),
    "3 parameters have no curvature",
    "runs below a transform of JAX's own|read below a function that was jitted",
    _WAYS_OUT,
)

UPDATE = topic("`estimator.update`: curvature and parameters", "step")
wrong = UPDATE.add


def update(**changes):
    """``update`` with arguments made from the right ones."""

    def call(g):
        made = {name: make(g) for name, make in changes.items()}
        return problem().estimator.update(
            made.pop("curvature", g.curvature),
            made.pop("params", g.params),
            made.pop("inputs", g.x),
            **({"rng": g.key} | made),
        )

    return call


_WITH_INIT = r"Call estimator\.update\(curvature, params, inputs, \.\.\.\)"
for _name, _curvature in (("`None`", None), ("a dict", {}), ("a tuple", (1, 2))):
    wrong(
        f"{_name} as the curvature",
        TypeError,
        update(curvature=lambda g, given=_curvature: given),
        r"takes the Curvature that estimator\.init returned",
        f"got {type(_curvature).__name__ if _curvature is not None else None}",
        _WITH_INIT,
    )
_OF_ITS_OWN = r"Call estimator\.init\(params, inputs\) of the one"
wrong(
    "the curvature of an estimator with other `rows`",
    ValueError,
    lambda g: fisher_estimator(model_fn, "squared_error", rows=2).update(
        g.curvature, g.params, g.x, rng=g.key
    ),
    "needs a curvature of its own estimator",
    "got one that comes from another estimator",
    _OF_ITS_OWN,
)
wrong(
    "the curvature of `value_and_grad`",
    ValueError,
    lambda g: problem().estimator.update(
        value_and_grad(problem().loss)(g.params, {"x": g.x, "y": g.y})[2],
        g.params,
        g.x,
        rng=g.key,
    ),
    "needs a curvature of its own estimator",
    r"or from value_and_grad \(window 1, layers hidden, out\)",
    _OF_ITS_OWN,
    mode="trace",
)
_PASS_RETURNED = r"Pass what estimator\.init or estimator\.update returned"
wrong(
    "a stack of curvatures",
    ValueError,
    update(curvature=lambda g: jax.tree.map(lambda leaf: leaf[None], g.curvature)),
    r"expected: \w+ \(8, 6\)",
    r"got: +\w+ \(1, 8, 6\)",
    _PASS_RETURNED,
)
wrong(
    "a curvature whose rows were cast",
    ValueError,
    update(
        curvature=lambda g: jax.tree.map(
            lambda x: x.astype(jnp.float16) if x.ndim else x, g.curvature
        )
    ),
    r"expected: float32 \(8, 6\)",
    r"got: +float16 \(8, 6\)",
    _PASS_RETURNED,
)
wrong(
    "a curvature with the rows of another window",
    ValueError,
    update(
        curvature=lambda g: dataclasses.replace(
            g.curvature, layers=g.curvature.with_window(3).layers
        )
    ),
    r"expected: float32 \(8, 6\)",
    r"got: +float32 \(12, 6\)",
    _PASS_RETURNED,
)
_AGAIN = r"The model has changed: call estimator\.init\(params, inputs\) again"
wrong(
    "parameters of a wider layer than at `init`",
    ValueError,
    update(params=lambda g: g.params | {"out": {"kernel": np.ones((4, 7))}}),
    r"expected: \(4, 3\)",
    r"got: +\(4, 7\)",
    _AGAIN,
)
wrong(
    "parameters with a layer more than at `init`",
    ValueError,
    update(params=lambda g: g.params | {"new": {"kernel": np.ones((4, 7))}}),
    "must have the parameters that estimator.init was given",
    "new: +new/kernel",
    _AGAIN,
)
wrong(
    "parameters with a layer less than at `init`",
    ValueError,
    update(params=lambda g: {"out": g.params["out"]}),
    "must have the parameters that estimator.init was given",
    "absent: hidden/bias, hidden/kernel",
    _AGAIN,
)
wrong(
    "all variables, where `init` was given the parameters",
    ValueError,
    update(params=lambda g: {"params": g.params}),
    "absent: hidden/bias",
    "new: +params/hidden/bias",
    _AGAIN,
)


def in_double_precision(g):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), g.params)
        return update(params=lambda g: params)(g)


wrong(
    "float64 parameters, which were float32 at `init`",
    ValueError,
    in_double_precision,
    "the curvature was initialised for float32",
    "has dtype float64",
    "Cast the parameters",
    mode="build",
)
wrong(
    "integers as parameters",
    TypeError,
    update(params=lambda g: jax.tree.map(lambda x: x.astype(int), g.params)),
    "must be real floating-point arrays",
    "has dtype int32",
    _INSIDE_INPUTS,
)
wrong(
    "no parameters",
    ValueError,
    update(params=lambda g: None),
    "params has no leaves",
    "got None",
    _PASS_TREE,
)


class Modes(nnx.Module):
    """A module with a mode."""

    def __init__(self):
        self.layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(self.layer(x))


def changed_mode(g):
    module = Modes()
    estimator = fisher_estimator(lambda m, x: m(x), "squared_error", rows=4)
    curvature = estimator.init(module, g.x)
    module.eval()
    return estimator.update(curvature, module, g.x, rng=g.key)


wrong(
    "an `nnx.Module` whose mode was changed after `init`",
    ValueError,
    changed_mode,
    "another structure than the one given to estimator.init",
    "got: +.*deterministic",
    "Set modes inside model_fn",
    mode="trace",
)

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
    _CONVERT,
)
wrong(
    "a smaller batch than the curvature keeps",
    ValueError,
    update(inputs=lambda g: g.x[:6]),
    "to capture rows=4 and to keep 8",
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


def new_update(fn=model_fn, loss="squared_error", inputs=None, at=None, **options):
    """``init`` and ``update`` of a new estimator."""
    arguments = {
        name: options.pop(name) for name in ("rng", "targets") if name in options
    }

    def call(g):
        estimator = fisher_estimator(fn, loss, **({"rows": 4, "window": 1} | options))
        first = g.x if inputs is None else inputs(g)
        curvature = estimator.init(g.params, first)
        made = {name: make(g) for name, make in arguments.items()}
        later = first if at is None else at(g)
        return estimator.update(curvature, g.params, later, **made)

    return call


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

KEYS = topic("`estimator.update`: keys", "step")
wrong = KEYS.add
_NEW_KEY = r"pass rng=jax\.random\.fold_in\(key, step\)"
wrong(
    "no key for `kind='mc'`",
    ValueError,
    update(rng=lambda g: None),
    "draws targets from the model and needs a key",
    "got None",
    _NEW_KEY,
)
for _name, _key, _got in (
    ("a seed", 0, "0"),
    ("a text", "key", "'key'"),
    ("a dict of keys", {"params": 0}, "dict"),
    ("an array of numbers", np.zeros(2, np.float32), "a float32 array of shape"),
    ("half a key of the old kind", np.zeros(1, np.uint32), "a uint32 array of shape"),
    (
        "a key of the old kind as int32",
        np.zeros(2, np.int32),
        "an int32 array of shape",
    ),
):
    wrong(
        f"{_name} in the place of the key",
        TypeError,
        update(rng=lambda g, key=_key: key),
        "rng must be a key",
        f"got {_got}",
        _NEW_KEY,
    )
wrong(
    "an `nnx.Rngs` in the place of the key",
    TypeError,
    update(rng=lambda g: nnx.Rngs(0)),
    "rng must be a key",
    "got Rngs",
    r"pass rng=.* or rng=rngs\(\)",
)
_ONE_OF_THEM = r"pass one of them, rng=keys\[step\]"
wrong(
    "several keys",
    ValueError,
    update(rng=lambda g: jax.random.split(g.key, 3)),
    "rng must be one key",
    r"got an array of \(3,\) of them",
    _ONE_OF_THEM,
)
wrong(
    "several keys of the old kind",
    ValueError,
    update(rng=lambda g: np.zeros((3, 2), np.uint32)),
    "rng must be one key",
    r"got an array of \(3,\) of them",
    _ONE_OF_THEM,
)
wrong(
    "the key that the inputs hold for dropout",
    ValueError,
    update(inputs=lambda g: {"x": g.x, "dropout": g.key}),
    "rng must be a key of its own",
    "got one that inputs hold too",
    "Split it before",
)

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
        _INSIDE_INPUTS,
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
        "have no curvature|without meeting a layer",
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
        names = {
            role: w if name == "itself" else name for role, name in self.names.items()
        }
        return tag_layer(self, x[self.cut :], x @ w, **names)


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
    "the parameter itself in the place of its name",
    TypeError,
    tagged(kernel="itself"),
    "kernel= must be the name of a parameter",
    r"got a float32 array of shape \(5, 4\)",
    "Pass kernel='kernel', say",
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
wrong(
    "something else than a module",
    TypeError,
    lambda g: tag_layer(3, g.x, g.x, bias="b"),
    "takes a Flax module, usually self",
    "got int",
    r"Call tag_layer\(self",
)
wrong(
    "a number as the input",
    TypeError,
    lambda g: tag_layer(Modes(), 1.0, g.x, bias="b"),
    r"x must be an array of shape \(N, \.\.\., features\)",
    "got 1.0",
    "Pass the layer's input",
)

TOPICS = [INIT, UPDATE, BATCHES, KEYS, SINGLE_PASS, TAGS]
