"""Wrong calls of ``tx.update``: gradients, parameters, state, the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core, nnx

from optax_cgfac import (
    cgfac,
    fisher_estimator,
    scale_by_cgfac,
    scale_by_kfac,
)
from steps import value_fn
from wrong.calls import BLOCK, step
from wrong.case import topic

TREES = topic("`tx.update`: gradients, parameters and state", "step")
wrong = TREES.add
_THESE = "Pass the gradients by these parameters"
wrong(
    "gradients of some of the parameters",
    ValueError,
    step(grads=lambda g: {"out": g.grads["out"]}),
    "cgfac: gradients and parameters must be trees of one structure",
    "absent: hidden/bias, hidden/kernel",
    _THESE,
)
wrong(
    "gradients of more than the parameters",
    ValueError,
    step(grads=lambda g: g.grads | {"new": g.x}),
    "must be trees of one structure",
    "new: +new",
    _THESE,
)
wrong(
    "gradients as a `FrozenDict`, parameters as a dict",
    ValueError,
    step(grads=lambda g: core.freeze(g.grads)),
    r"expected: PyTreeDef\(\{'hidden'",
    r"got: +PyTreeDef\(CustomNode\(FrozenDict",
    _THESE,
)
wrong(
    "gradients as a list",
    ValueError,
    step(grads=lambda g: jax.tree.leaves(g.grads)),
    "must be trees of one structure",
    "new: +0, 1, 2",
    _THESE,
)
wrong(
    "`None` as the gradients",
    ValueError,
    step(grads=lambda g: None),
    "must be trees of one structure",
    "absent: hidden/bias",
    _THESE,
)
wrong(
    "a gradient of another shape than its parameter",
    ValueError,
    step(grads=lambda g: g.grads | {"out": {"kernel": g.grads["out"]["kernel"].T}}),
    r"expected: \(4, 3\)",
    r"got: +\(3, 4\)",
    _THESE,
)
_REAL = "Pass the gradients of a real loss"
for _name, _dtype in (("cgfac", jnp.int32), ("scale_by_kfac", jnp.complex64)):
    _text = jnp.dtype(_dtype).name
    wrong(
        f"gradients of dtype {_text}",
        TypeError,
        step(
            _name,
            grads=lambda g, dtype=_dtype: jax.tree.map(
                lambda leaf: leaf.astype(dtype), g.grads
            ),
        ),
        "expected a real floating-point array",
        f"{_name}: gradient 'hidden/bias' has dtype {_text}",
        _REAL,
    )
wrong(
    "a gradient of dtype float0, of an integer parameter",
    TypeError,
    step(
        "scale_by_cgfac",
        grads=lambda g: (
            g.grads | {"out": {"kernel": np.zeros((4, 3), jax.dtypes.float0)}}
        ),
    ),
    "expected a real floating-point array",
    "gradient 'out/kernel' has dtype",
    _REAL,
)
wrong(
    "a text in the place of a gradient",
    TypeError,
    step("scale_by_cgfac", grads=lambda g: g.grads | {"out": {"kernel": "none"}}),
    "expected a real floating-point array",
    "gradient 'out/kernel' is no array",
    _REAL,
)
wrong(
    "no parameters for `cgfac`",
    ValueError,
    step(params=lambda g: None),
    "cgfac needs the parameters",
    "got None",
    "pass them as the third argument",
)
wrong(
    "parameters of another structure",
    ValueError,
    step(params=lambda g: {"params": g.params}),
    "absent: params/hidden/bias",
    "new: +hidden/bias",
    _THESE,
)
wrong(
    "parameters of another dtype than at `tx.init`",
    ValueError,
    step(params=lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g.params)),
    "expected: float32",
    "got: +bfloat16",
    "Cast the parameters back",
)
_CALL_UPDATE = r"Call tx\.update\(grads, opt_state, params"
wrong(
    "the state before the gradients",
    TypeError,
    step(grads=lambda g: cgfac().init(g.params), state=lambda g: g.grads),
    "must be the CGFACState of its own init",
    "got dict",
    _CALL_UPDATE,
)
wrong(
    "another optimizer's state",
    TypeError,
    step(state=lambda g: optax.adam(1e-3).init(g.params)),
    "must be the CGFACState of its own init",
    "got tuple",
    _CALL_UPDATE,
)
wrong(
    "the state of `scale_by_cgfac` in `cgfac`",
    TypeError,
    step(state=lambda g: scale_by_cgfac(0.1).init(g.params)),
    "must be the CGFACState of its own init",
    "got ScaleByCGFACState",
    _CALL_UPDATE,
)
wrong(
    "a state that was restored as a dict",
    TypeError,
    step("scale_by_kfac", state=lambda g: scale_by_kfac(0.1).init(g.params)._asdict()),
    "scale_by_kfac: the optimizer state must be the ScaleByCGFACState of its own init",
    "got dict",
    "Call tx.update",
)
_INIT_AGAIN = r"Call tx\.init\(params\) again"
for _name, _expected, _got in (
    ("cgfac", r"expected: \(4, 7\)", r"got: +\(4, 3\)"),
    ("scale_by_cgfac", r"expected: \(4, 7\)", r"got: +\(4, 3\)"),
):
    wrong(
        f"the state of parameters of other shapes in `{_name}`",
        ValueError,
        step(
            _name,
            state=lambda g, name=_name: BLOCK[name]().init(
                g.params | {"out": {"kernel": jnp.ones((4, 7))}}
            ),
        ),
        _expected,
        _got,
        _INIT_AGAIN,
    )
wrong(
    "the state of fewer parameters in `scale_by_kfac`",
    ValueError,
    step("scale_by_kfac", state=lambda g: scale_by_kfac(0.1).init({"out": g.x})),
    "expected: gradients of 1 parameters",
    "got: +gradients of 3",
    _INIT_AGAIN,
)
wrong(
    "`optax.masked` around `cgfac` without a learning rate",
    ValueError,
    step(
        lambda: optax.masked(
            cgfac(),
            {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}},
        )
    ),
    "needs the gradients of all layers",
    "absent: hidden/bias",
    r"To train only some parameters, pass cgfac\(where=",
)

LOSSES = topic("`tx.update`: the loss, schedules", "step")
wrong = LOSSES.add
for _absent, _changes in (
    ("value and value_fn", {"value": lambda g: None, "value_fn": lambda g: None}),
    ("value_fn", {"value_fn": lambda g: None}),
    ("value", {"value": lambda g: None}),
):
    wrong(
        f"no `{_absent.replace(' and ', '` and no `')}` without a learning rate",
        ValueError,
        step(**_changes),
        rf"cgfac\(\) without a learning_rate needs {_absent}",
        "got None",
        r"updates, opt_state = tx\.update\(\s+grads, opt_state, params, curvature=.*"
        r"optimizer\.update\(",
    )
_PASS_LOSS = r"Pass value=loss of loss, grads = jax\.value_and_grad"
for _name, _value, _error, _got in (
    ("the losses of the examples", lambda g: g.y[:, 0], ValueError, r"shape \(8,\)"),
    ("`(loss, aux)`", lambda g: (g.value, {}), TypeError, "tuple"),
    ("a text", lambda g: "0.5", TypeError, "'0.5'"),
    ("a bool", lambda g: True, TypeError, "True"),
    ("a complex number", lambda g: g.value + 1j, TypeError, r"shape \(\), complex64"),
    ("the loss function", lambda g: value_fn, TypeError, "function"),
):
    wrong(
        f"{_name} as `value`",
        _error,
        step(value=_value),
        "value must be the scalar loss of this batch, a real number",
        f"got {_got}",
        _PASS_LOSS,
    )
wrong(
    "the losses of the examples as `value`, with a learning rate",
    ValueError,
    step(lambda: cgfac(0.1), value=lambda g: g.y[:, 0]),
    "value must be the scalar loss",
    r"got shape \(8,\)",
    _PASS_LOSS,
)
for _name, _value_fn, _got in (
    ("a number", lambda g: 3.0, "3.0"),
    ("the loss itself", lambda g: g.value, r"a float32 array of shape \(\)"),
    (
        "a function of parameters and batch",
        lambda g: lambda params, batch: 0.0,
        r"one of \(params, batch\)",
    ),
):
    wrong(
        f"{_name} as `value_fn`",
        TypeError,
        step(value_fn=_value_fn),
        r"value_fn must be a function, called as value_fn\(params\)",
        f"got {_got}",
        r"such as (lambda p: loss_fn\(p, batch\))",
    )
_WITHOUT_AUX = "For a loss with auxiliary outputs"
for _name, _returned, _got in (
    ("`(loss, aux)`", lambda p: (jnp.zeros(()), {}), "tuple"),
    ("several losses", lambda p: jnp.zeros(3), r"a float32 array of shape \(3,\)"),
    ("nothing", lambda p: None, "None"),
    ("a complex number", lambda p: jnp.zeros((), complex), "a complex64 array"),
):
    wrong(
        f"a `value_fn` that returns {_name}",
        ValueError,
        step(value_fn=lambda g, given=_returned: given),
        "value_fn must return the scalar loss, a real number",
        f"got {_got}",
        _WITHOUT_AUX,
        mode="trace",
    )


def of_module(value_fn):
    def call(g):
        module = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        estimator = fisher_estimator(lambda m, x: m(x), "squared_error", examples=4)
        curvature = estimator.init(module, g.x)
        grads = nnx.grad(lambda m: jnp.mean(m(g.x) ** 2))(module)
        optimizer = nnx.Optimizer(module, cgfac(), wrt=nnx.Param)
        optimizer.update(
            module, grads, curvature=curvature, value=g.value, value_fn=value_fn
        )

    return call


wrong(
    "a `value_fn` of the `nnx.Module`, in the place of its state",
    TypeError,
    of_module(lambda module: jnp.mean(module(jnp.ones((8, 5))) ** 2)),
    "value_fn must take what it is given",
    "got an nnx.State, with which it fails",
    "Merge the module from it",
    mode="trace",
)
for _option, _tx in (
    ("learning_rate", lambda schedule: lambda: cgfac(schedule)),
    ("damping", lambda schedule: lambda: scale_by_kfac(schedule)),
):
    for _name, _returned, _error, _got in (
        ("several numbers", lambda c: jnp.ones(2), ValueError, r"a .* of shape \(2,\)"),
        ("nothing", lambda c: None, TypeError, "None"),
    ):
        wrong(
            f"a schedule `{_option}` that returns {_name}",
            _error,
            step(_tx(_returned)),
            f"The schedule {_option} must return one real number",
            f"got {_got}",
            f"Write {_option}=lambda count",
            mode="trace",
        )

TOPICS = [TREES, LOSSES]
