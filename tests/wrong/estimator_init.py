"""Wrong calls of ``estimator.init``."""

import jax
import numpy as np
from flax import nnx

from steps import MLP, model_fn
from wrong.calls import CONVERT, INSIDE_INPUTS, PASS_TREE, Modes, init
from wrong.case import topic

INIT = topic("`estimator.init`", "step")
wrong = INIT.add


wrong(
    "`None` as the parameters",
    ValueError,
    init(lambda g: None),
    "params has no leaves",
    r"\(got None\)",
    PASS_TREE,
)
wrong(
    "an empty dict as the parameters",
    ValueError,
    init(lambda g: {}),
    "params has no leaves",
    r"\(got dict\)",
    PASS_TREE,
)
wrong(
    "the inputs before the parameters",
    TypeError,
    init(lambda g: g.x, lambda g: g.params),
    "must be a tree of named parameters",
    r"got a float32 array of shape \(8, 5\)",
    "Pass the parameters first",
)
for _dtype in ("int32", "bool", "complex64"):
    wrong(
        f"a parameter of dtype {_dtype}",
        TypeError,
        init(lambda g, dtype=_dtype: g.params | {"steps": np.zeros(3, dtype)}),
        "parameters must be real floating-point arrays",
        f"'steps' has dtype {_dtype}",
        INSIDE_INPUTS,
    )
wrong(
    "a key among the parameters",
    TypeError,
    init(lambda g: g.params | {"rng": g.key}),
    "parameters must be real floating-point arrays",
    "'rng' has dtype key",
    INSIDE_INPUTS,
)
_CALL = {"fn": lambda module, x: module(x)}
wrong(
    "the state of an `nnx.Module`",
    TypeError,
    init(lambda g: nnx.state(Modes(), nnx.Param), **_CALL),
    r"params must be the nnx\.Module itself",
    r"got its nnx\.State",
    "Pass the module",
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
        CONVERT,
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
    "fewer examples than `examples`",
    ValueError,
    init(inputs=lambda g: g.x[:3]),
    "examples=4 are captured",
    "the inputs hold 3",
    r"Pass fisher_estimator\(\.\.\., examples=3\)",
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
    init(fn=lambda p, x: model_fn(p, x).T[:2], examples=2),
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
    "1 parameter has no curvature",
    "hidden/bias: where leaves its kernel 'hidden/kernel' out",
    _WAYS_OUT,
)
wrong(
    "a parameter that no layer reads",
    ValueError,
    init(lambda g: g.params | {"old": {"kernel": g.x}}),
    "1 parameter has no curvature",
    "old/kernel: no module that reads it was met",
    _WAYS_OUT,
)
wrong(
    "a `model_fn` that is jitted",
    ValueError,
    # A new function every time: JAX remembers what it has traced.
    lambda g: init(fn=jax.jit(lambda p, x: MLP().apply({"params": p}, x)))(g),
    "3 parameters have no curvature",
    "runs below a transform of JAX's own|read below a function that was jitted",
    _WAYS_OUT,
)

TOPICS = [INIT]
