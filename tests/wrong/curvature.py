"""Wrong calls of a curvature's methods, of operators, solver and diagnostics."""

import jax.numpy as jnp
import numpy as np
import optax

import optax_cgfac
from optax_cgfac import (
    DampedOperator,
    DiagonalOperator,
    cgfac,
    conjugate_gradient,
    diagnostics,
    jacobi_preconditioner,
    scalars,
    stop_reasons,
    value_and_grad,
)
from steps import model_fn, problem
from wrong.case import topic

METHODS = topic("`Curvature`", "build")
wrong = METHODS.add
wrong(
    "a path as a tuple in `covers`",
    TypeError,
    lambda g: g.curvature.covers(("hidden", "kernel")),
    "takes a parameter's path as a text",
    "got tuple",
    r"Write curvature\.covers",
)
for _method in ("num_rows", "operator"):
    wrong(
        f"an unknown layer in `{_method}`",
        ValueError,
        lambda g, method=_method: getattr(g.curvature, method)("Dense_7"),
        "Tagged layers: hidden, out",
        "No tagged layer 'Dense_7'",
        "Pass one of them",
    )
for _name, _damping, _error, _must, _got in (
    ("-1.0", -1.0, ValueError, "be finite and not negative", "-1.0"),
    ("'low'", "low", TypeError, "be a number", "'low'"),
    ("ones(1)", np.ones(1), ValueError, "be one number", r"a .* of shape \(1,\)"),
    ("schedule", lambda count: 0.1, TypeError, "be a number", "a function"),
):
    wrong(
        f"`operator('out', damping={_name})`",
        _error,
        lambda g, damping=_damping: g.curvature.operator("out", damping=damping),
        f"damping must {_must}",
        f"got {_got}",
        "Pass a number such as damping=",
    )
wrong(
    "an unknown structure of an operator",
    ValueError,
    lambda g: g.curvature.operator("out", structure="diagonal"),
    "structure must be one of 'kronecker', 'block', 'full'",
    "got 'diagonal'",
    "Pass structure='kronecker', say",
)
wrong(
    "all layers in one Kronecker-factored operator",
    ValueError,
    lambda g: g.curvature.operator(None),
    "structure='full' takes path=None",
    "Got path=None, structure='kronecker'",
    r"Pass operator\('hidden'\)",
)
wrong(
    "something else in `push`",
    TypeError,
    lambda g: g.curvature.push(g.curvature.layers),
    r"push\(\) takes a Curvature",
    "got dict",
    "Pass the third result of value_and_grad",
)


def single_pass(g, count=8):
    batch = {"x": g.x[:count], "y": g.y[:count]}
    return value_and_grad(problem().loss)(g.params, batch)[2]


_START = r"Start the window with curvature\.with_window\(8\)"
wrong(
    "the rows of a smaller batch in `push`",
    ValueError,
    lambda g: single_pass(g).with_window(2).push(single_pass(g, 4)),
    r"expected: hidden \(8 rows\), out \(8 rows\), window 1",
    r"got: +hidden \(4 rows\), out \(4 rows\), window 1",
    _START,
    mode="trace",
)
wrong(
    "the rows of several updates in `push`",
    ValueError,
    lambda g: g.curvature.push(g.curvature),
    "of the same layers with window 1",
    "got: .*window 2",
    _START,
)
for _window in (0, 2.0):
    wrong(
        f"`with_window({_window})`",
        ValueError,
        lambda g, window=_window: g.curvature.with_window(window),
        "window must be an int of at least 1",
        f"got {_window}",
        "Pass a Python int",
    )
wrong(
    "a number in `partition_specs`",
    TypeError,
    lambda g: g.curvature.partition_specs(0),
    "takes the name of a mesh axis",
    "got 0",
    r"Write curvature\.partition_specs\('batch'\)",
)
wrong(
    "an unknown option in `report`",
    TypeError,
    lambda g: g.curvature.report(dampings="factored"),
    r"report\(\) takes the options of the solve, axis, certify, damping_form",
    "got dampings",
    "Leave out what scale_by_cgfac does not take",
)

OPERATORS = topic("Operators and `conjugate_gradient`", "step")
wrong = OPERATORS.add
_ONE_MATRIX = "Bring kernel and bias into that form"
for _name, _options in (
    ("`KroneckerOperator`", {}),
    ("`DampedOperator`", {"damping": 0.1}),
    ("`FactoredDampedOperator`", {"damping": 0.1, "damping_form": "factored"}),
    ("`BlockFisherOperator`", {"structure": "block"}),
):
    wrong(
        f"a kernel without its bias in the `matvec` of {_name}",
        ValueError,
        lambda g, options=_options: g.curvature.operator("hidden", **options).matvec(
            g.params["hidden"]["kernel"]
        ),
        r"expected: \(\.\.\., 6, 4\)",
        r"got: +\(5, 4\)",
        _ONE_MATRIX,
        mode="trace",
    )
wrong(
    "one matrix in `FullFisherOperator.matvec`",
    ValueError,
    lambda g: g.curvature.operator(None, structure="full").matvec(g.x),
    r"expected: 2 of shapes \[\(6, 4\), \(4, 3\)\]",
    r"got: +\(8, 5\)",
    r"Pass them in the order of curvature\.tags",
    mode="trace",
)
wrong(
    "a vector of another length in `DiagonalOperator.matvec`",
    ValueError,
    lambda g: DiagonalOperator(g.x[0]).matvec(g.x[0, :1]),
    r"expected: \(5,\)",
    r"got: +\(1,\)",
    "Reshape the vector",
    mode="trace",
)
wrong(
    "an operator without a diagonal in `jacobi_preconditioner`",
    TypeError,
    lambda g: jacobi_preconditioner({"entries": g.x}),
    r"takes an operator with a diagonal\(\)",
    "got dict",
    "Pass DampedOperator",
)


def solve(b, x0=None, **options):
    return lambda g: conjugate_gradient(
        DampedOperator(DiagonalOperator(g.x), 0.1),
        b(g),
        None if x0 is None else x0(g),
        **({"max_steps": 2} | options),
    )


wrong(
    "integers as the right-hand side",
    TypeError,
    solve(lambda g: g.x.astype(int)),
    "b must hold real floating-point arrays",
    "got dtype int32",
    r"Convert with jnp\.asarray",
)
for _name, _b in (("no array", {}), ("a number", 1.0)):
    wrong(
        f"{_name} as the right-hand side",
        TypeError,
        solve(lambda g, b=_b: b),
        "b must hold real floating-point arrays",
        f"got {'dict without any' if _b == {} else _b}",
        "Pass the right-hand side" if _b == {} else r"Convert with jnp\.asarray",
    )
for _name in ("operator", "preconditioner"):
    wrong(
        f"a matrix as the {_name}",
        TypeError,
        lambda g, name=_name: conjugate_gradient(
            **(
                {"operator": DiagonalOperator(g.x), "b": g.x, "max_steps": 2}
                | {name: g.x}
            )
        ),
        rf"{_name} must have a matvec\(vector\)",
        r"got a float32 array of shape \(8, 5\)",
        r"Pass an operator of optax_cgfac",
    )


class Summed:
    """An operator that returns a scalar, which broadcasts with any vector."""

    def matvec(self, vector):
        return vector.sum()


wrong(
    "an operator whose `matvec` returns another shape",
    ValueError,
    lambda g: conjugate_gradient(Summed(), g.x, max_steps=2),
    r"expected: \(8, 5\)",
    r"got: +\(\)",
    "Return the product in the structure and shapes of b",
)
_FROM_ZERO = r"Start from jax\.tree\.map\(jnp\.zeros_like, b\)"
for _name, _x0, _got in (
    ("shape", lambda g: g.x[0], r"\(\(5,\), 'float32'\)"),
    ("dtype", lambda g: g.x.astype(jnp.bfloat16), r"\(\(8, 5\), 'bfloat16'\)"),
    ("structure", lambda g: {"w": g.x}, r"\{'w': \(\(8, 5\), 'float32'\)\}"),
):
    wrong(
        f"a warm start of another {_name}",
        ValueError,
        solve(lambda g: g.x, _x0),
        r"expected: \(\(8, 5\), 'float32'\)",
        f"got: +{_got}",
        _FROM_ZERO,
    )
for _steps in (0, 1.5):
    wrong(
        f"`max_steps={_steps}`",
        ValueError,
        solve(lambda g: g.x, max_steps=_steps),
        "max_steps must be an int of at least 1",
        f"got {_steps}",
        "Pass a Python int",
    )
for _name, _value, _error, _expected in (
    ("rtol", -0.5, ValueError, "be finite and not negative"),
    ("atol", float("nan"), ValueError, "be finite and not negative"),
    ("rtol", None, TypeError, "be a number"),
):
    wrong(
        f"`{_name}={_value}`",
        _error,
        solve(lambda g: g.x, **{_name: _value}),
        f"{_name} must {_expected}",
        f"got {_value}",
        f"Pass a number such as {_name}=",
    )
wrong(
    "a right-hand side of another shape than the operator",
    ValueError,
    solve(lambda g: g.x[0], lambda g: g.x[0]),
    r"expected: \(8, 5\)",
    r"got: +\(5,\)",
    "Reshape the vector",
    mode="trace",
)

LOOKING = topic("`diagnostics`, `scalars`, `TrainState`", "step")
wrong = LOOKING.add
_ONE_STATE = "Pass the state of one optimizer"
wrong(
    "another optimizer's state in `diagnostics`",
    ValueError,
    lambda g: diagnostics(optax.adam(1e-3).init(g.params)),
    "Expected one CG-FAC state inside opt_state",
    r"found 0 \(in tuple\)",
    _ONE_STATE,
)
wrong(
    "two states in `scalars`",
    ValueError,
    lambda g: scalars([cgfac().init(g.params), cgfac().init(g.params)]),
    "Expected one CG-FAC state inside opt_state",
    r"found 2 \(in list\)",
    _ONE_STATE,
)
wrong(
    "`stop_reasons` below `jax.jit`",
    TypeError,
    lambda g: stop_reasons(cgfac().init(g.params)),
    "must be given arrays",
    "got traced ones",
    "Call it outside jax.jit, and diagnostics inside",
    mode="trace",
)
wrong(
    "a number as the prefix of `scalars`",
    TypeError,
    lambda g: scalars(cgfac().init(g.params), prefix=3),
    "prefix must be a text",
    "got 3",
    "Pass prefix='cgfac'",
)


def applied(**arguments):
    def call(g):
        state = optax_cgfac.TrainState.create(
            apply_fn=model_fn, params=g.params, tx=cgfac(), curvature=g.curvature
        )
        return state.apply_gradients(grads=g.grads, **arguments)

    return call


wrong(
    "`extra_args` of `TrainState` that are no dict",
    TypeError,
    applied(extra_args=["grad"]),
    "must be a dict of keyword arguments of tx.update",
    "got list",
    r"Pass extra_args=\{'grad'",
)
wrong(
    "the loss among the `extra_args` of `TrainState`",
    ValueError,
    applied(extra_args={"value": 0.5}),
    "must hold further arguments",
    "got value in it",
    "Pass these to apply_gradients",
)
wrong(
    "a `TrainState` without a curvature",
    ValueError,
    lambda g: optax_cgfac.TrainState.create(
        apply_fn=model_fn, params=g.params, tx=cgfac()
    ).apply_gradients(grads=g.grads),
    "needs the curvature of this step",
    "got None",
    r"curvature = estimator\.update",
)

TOPICS = [METHODS, OPERATORS, LOOKING]
