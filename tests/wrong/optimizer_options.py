"""Wrong options of `cgfac`, `scale_by_cgfac` and `scale_by_kfac`."""

import jax.numpy as jnp
import numpy as np
import optax

from optax_cgfac import cgfac, scale_by_cgfac, scale_by_kfac
from wrong.case import topic

NUMBERS = topic("`cgfac`, `scale_by_cgfac`, `scale_by_kfac`: numbers", "build")
wrong = NUMBERS.add


def rated(**options):
    return cgfac(0.1, **options)


def blocks(**options):
    return scale_by_cgfac(0.1, **options)


_NAMES = {cgfac: "cgfac", rated: "cgfac", blocks: "scale_by_cgfac"}
_NAMES |= {scale_by_cgfac: "scale_by_cgfac", scale_by_kfac: "scale_by_kfac"}
_NOT_NEGATIVE = "be finite and not negative"
# Function, option, value, what it must be, and what is said of it if not its repr.
for _function, _option, _value, _must, *_said in (
    (cgfac, "learning_rate", -0.1, _NOT_NEGATIVE),
    (cgfac, "learning_rate", np.nan, _NOT_NEGATIVE),
    (cgfac, "learning_rate", np.inf, _NOT_NEGATIVE),
    (cgfac, "learning_rate", True, "be a number"),
    (cgfac, "learning_rate", "0.1", "be a number"),
    (cgfac, "learning_rate", [0.1], "be a number", "list"),
    (cgfac, "learning_rate", 1j, "be a number"),
    (cgfac, "learning_rate", np.ones(1), "be one number", r".* of shape \(1,\)"),
    (cgfac, "learning_rate", np.array("a"), "be a real number", "a <U1 array"),
    (cgfac, "damping", -1.0, _NOT_NEGATIVE),
    (rated, "damping", np.array(-1.0), _NOT_NEGATIVE, "-1.0"),
    (scale_by_cgfac, "damping", np.float32(-0.5), _NOT_NEGATIVE, "-0.5"),
    (scale_by_cgfac, "damping", np.nan, _NOT_NEGATIVE),
    (scale_by_cgfac, "damping", None, "be a number"),
    (scale_by_cgfac, "damping", "auto", "be a number"),
    (scale_by_kfac, "damping", np.inf, _NOT_NEGATIVE),
    (scale_by_kfac, "damping", np.ones((2, 1)), "be one number", r".* shape \(2, 1\)"),
    (scale_by_kfac, "damping", False, "be a number"),
    (rated, "momentum", 1.0, r"lie in \[0, 1\)"),
    (rated, "momentum", -0.1, r"lie in \[0, 1\)"),
    (cgfac, "momentum", np.nan, r"lie in \[0, 1\)"),
    (cgfac, "momentum", "heavy", "be a number"),
    (rated, "l2", -1e-3, _NOT_NEGATIVE, "-0.001"),
    (cgfac, "l2", None, "be a number"),
    (cgfac, "l2", True, "be a number"),
    (rated, "kl_clip", 0, "be finite and positive"),
    (rated, "kl_clip", -1.0, "be finite and positive"),
    (rated, "kl_clip", "small", "be a number"),
    (cgfac, "damping_decay", 0.0, r"lie in \(0, 1\)"),
    (cgfac, "damping_decay", 1.0, r"lie in \(0, 1\)"),
    (cgfac, "damping_decay", None, "be a number"),
    (cgfac, "min_damping", -1.0, _NOT_NEGATIVE),
    (cgfac, "min_damping", "low", "be a number"),
    (cgfac, "max_damping", 0, "be positive"),
    (cgfac, "max_damping", np.nan, "be positive"),
    (blocks, "rtol", 1.0, r"lie in \[0, 1\)"),
    (blocks, "rtol", np.nan, r"lie in \[0, 1\)"),
    (blocks, "rtol", "1e-2", "be a number"),
    (cgfac, "rtol", -0.1, r"lie in \[0, 1\)"),
):
    wrong(
        f"`{_NAMES[_function]}({_option}={_value!r})`",
        TypeError if _must in ("be a number", "be a real number") else ValueError,
        lambda g, function=_function, given={_option: _value}: function(**given),
        f"{_option} must {_must}",
        f"got {_said[0] if _said else repr(_value)}",
        f"Pass a number such as {_option}=",
    )
for _function, _option, _value, _got in (
    (blocks, "max_steps", 0, "0"),
    (blocks, "max_steps", 2.5, "2.5"),
    (cgfac, "max_steps", np.ones(1), r"a float64 array of shape \(1,\)"),
    (cgfac, "damping_interval", 0, "0"),
    (cgfac, "damping_interval", "often", "'often'"),
    (cgfac, "model_interval", 1.5, "1.5"),
    (rated, "model_interval", True, "True"),
):
    wrong(
        f"`{_NAMES[_function]}({_option}={_value!r})`",
        ValueError,
        lambda g, function=_function, given={_option: _value}: function(**given),
        f"{_option} must be .*an int of at least 1",
        f"got {_got}",
        f"Pass a Python int such as {_option}=8",
    )
for _option in ("momentum", "l2", "kl_clip", "damping_decay", "min_damping"):
    wrong(
        f"a schedule as `{_option}`",
        TypeError,
        lambda g, name=_option: rated(**{name: optax.constant_schedule(0.1)}),
        f"{_option} must be a number",
        "got a function: it takes no schedule by itself",
        f"Pass a number such as {_option}=.*inject_hyperparams",
    )
for _function, _option in ((cgfac, "learning_rate"), (scale_by_kfac, "damping")):
    wrong(
        f"a schedule of two arguments as the `{_option}` of `{_NAMES[_function]}`",
        TypeError,
        lambda g, function=_function, name=_option: function(
            **{name: lambda count, loss: 0.1}
        ),
        rf"{_option} must be a function, called as {_option}\(count\)",
        r"got one of \(count, loss\)",
        "such as (lambda count: 0.1)",
    )
_BOUNDS = topic("`cgfac`: options that do not go together", "build")
wrong = _BOUNDS.add
wrong(
    "`min_damping` above `max_damping`",
    ValueError,
    lambda g: cgfac(min_damping=2.0, max_damping=1.0),
    "0 <= min_damping <= max_damping",
    "got 2.0 and 1.0",
    "Lower min_damping",
)
wrong(
    "an initial damping above `max_damping`",
    ValueError,
    lambda g: cgfac(damping=1e9, max_damping=1e4),
    r"must lie in \[min_damping, max_damping\] = \[0, 10000\]",
    r"got 1e\+09",
    "Move the bounds",
)
wrong(
    "an initial damping of 0",
    ValueError,
    lambda g: cgfac(damping=0.0),
    "The initial damping must be positive",
    "got 0",
    "Pass damping=None",
)
wrong(
    "a schedule of dampings without a learning rate",
    ValueError,
    lambda g: cgfac(damping=lambda count: 0.1),
    "Without a learning_rate the damping adapts itself",
    "got a schedule",
    "pass its initial value, or a learning_rate",
)
wrong(
    "`kl_clip` without a learning rate",
    ValueError,
    lambda g: cgfac(kl_clip=1e-3),
    "kl_clip needs a learning_rate",
    "got kl_clip=0.001 without one",
    "Drop kl_clip",
)
wrong(
    "`fallback` without `where`",
    ValueError,
    lambda g: cgfac(fallback=optax.sgd(0.1)),
    "fallback needs where=",
    "got None",
    "Pass cgfac",
)
wrong(
    "`where` without `fallback`",
    ValueError,
    lambda g: cgfac(where=lambda path: True),
    "where= needs fallback=",
    "got None",
    "Pass fallback=",
)
_ADAM = r"Pass fallback=optax\.adam"
for _fallback, _got in ((0.1, "0.1"), (optax.adam, "function"), (True, "True")):
    wrong(
        f"`fallback={'optax.adam' if callable(_fallback) else _fallback}`",
        TypeError,
        lambda g, given=_fallback: cgfac(fallback=given, where=lambda path: True),
        r"must be an optax\.GradientTransformation",
        f"got {_got}",
        _ADAM,
    )
wrong(
    "a text as `where`",
    TypeError,
    lambda g: cgfac(fallback=optax.sgd(0.1), where="hidden"),
    r"where must be a function, called as where\(path\)",
    "got 'hidden'",
    "such as (lambda path: 'Dense' in path)",
)
wrong(
    "`structure='full'` with `solve_axis`",
    ValueError,
    lambda g: blocks(structure="full", solve_axis="layers"),
    "structure='full' is one system",
    "solve_axis='layers'",
    "Leave it out",
)
wrong(
    "`solver='cholesky'` with Tikhonov damping",
    ValueError,
    lambda g: blocks(solver="cholesky"),
    "solver='cholesky' needs damping_form='factored'",
    "the Tikhonov system does not separate",
    "Use solver='cg'",
)
wrong(
    "`structure='block'` with factored damping",
    ValueError,
    lambda g: blocks(structure="block", damping_form="factored"),
    "damping_form='factored' needs structure='kronecker'",
    "structure='block' has no factors",
    "Use damping_form='tikhonov'",
)
wrong(
    "`preconditioner='jacobi'` on coefficients of rows",
    ValueError,
    lambda g: blocks(preconditioner="jacobi"),
    "needs space='parameter' and structure='kronecker'",
    "Got space='auto'",
    "needs (space='parameter') and",
)

CHOICES = topic("`cgfac`, `scale_by_cgfac`, `scale_by_kfac`: names", "build")
wrong = CHOICES.add
for _function, _option, _value, _choices in (
    (cgfac, "structure", "tri", "'kronecker', 'block', 'full'"),
    (blocks, "structure", None, "'kronecker', 'block', 'full'"),
    (scale_by_kfac, "damping_form", "both", "'tikhonov', 'factored'"),
    (cgfac, "damping_form", "", "'tikhonov', 'factored'"),
    (blocks, "space", "rows", "'auto', 'parameter', 'sample'"),
    (blocks, "solver", "lu", "'auto', 'cg', 'cholesky'"),
    (blocks, "preconditioner", "ilu", "None, 'jacobi'"),
    (cgfac, "missing", "ignore", "'raise', 'gradient'"),
    (scale_by_kfac, "missing", True, "'raise', 'gradient'"),
):
    _given = {"damping": 0.1} if _function is scale_by_kfac else {}
    wrong(
        f"`{_NAMES[_function]}({_option}={_value!r})`",
        ValueError,
        lambda g, function=_function, given=_given | {_option: _value}: function(
            **given
        ),
        f"{_option} must be one of {_choices}",
        f"got {_value!r}",
        f"Pass {_option}=",
    )
wrong(
    "`warm_start='no'`",
    TypeError,
    lambda g: blocks(warm_start="no"),
    "warm_start must be True or False",
    "got 'no'",
    "Pass warm_start=True",
)
wrong(
    "`solve_axis=0`",
    TypeError,
    lambda g: blocks(solve_axis=0),
    "must be the name of a mesh axis or None",
    "got 0",
    "Pass the name, solve_axis='layers', say",
)

INIT = topic("`tx.init`", "step")
wrong = INIT.add
_LEAVE_IT = r"Leave it to another transformation by optax\.partition"
wrong(
    "`None` as the parameters",
    TypeError,
    lambda g: cgfac().init(None),
    "must be given the tree of parameters",
    "got None",
    r"Call tx\.init\(params\)",
)
for _dtype in (jnp.int32, jnp.complex64):
    _name = jnp.dtype(_dtype).name
    wrong(
        f"a parameter of dtype {_name}",
        TypeError,
        lambda g, dtype=_dtype: scale_by_cgfac(0.1).init(
            g.params | {"steps": jnp.zeros((), dtype)}
        ),
        "scale_by_cgfac: parameter 'steps' must be a real floating-point array",
        f"got an? {_name} array",
        _LEAVE_IT,
    )
wrong(
    "a text among the parameters",
    TypeError,
    lambda g: cgfac().init(g.params | {"name": "mlp"}),
    "cgfac: parameter 'name' must be a real floating-point array",
    "got 'mlp'",
    _LEAVE_IT,
)

TOPICS = [NUMBERS, CHOICES, _BOUNDS, INIT]
