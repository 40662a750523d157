"""What capture relies on in Flax, one test for each hook.

Some of it Flax documents little or not at all. A failure says which file of the package
to look at, before the tests of that file fail in ways that say less.
"""

import contextlib
import inspect
import pathlib
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn
from flax.core.scope import Scope, subtract_filters, union_filters

import optax_cgfac

LINEN, NNX = "capture/linen/tap.py", "capture/nnx/tap.py"
LAYERS_OF = {LINEN: "capture/linen/layers.py", NNX: "capture/nnx/layers.py"}
DESCRIBE, MODULE = "capture/describe.py", "capture/nnx/module.py"
TAG_LAYER = "capture/tag_layer.py"
X = jnp.ones((2, 3))


@contextlib.contextmanager
def relies_on(what, *where):
    """Fails with the name of a hook whatever goes wrong with it."""
    try:
        yield
    except Exception as error:
        detail = (str(error).splitlines() or [""])[0]
        pytest.fail(
            f"Flax {version('flax')} changed {what}: {' and '.join(where)} in "
            f"optax_cgfac/ relies on it. {type(error).__name__}: {detail}",
            pytrace=False,
        )


def test_a_failure_names_the_hook_and_the_file():
    message = r"Flax \d+\..* changed Scope\.root: .*tap\.py in .* relies on it\. Attr"
    with (
        pytest.raises(pytest.fail.Exception, match=message),
        relies_on("Scope.root", LINEN),
    ):
        raise AttributeError("no root")


# ------------------------------------------------------------------------- Linen


class Scaled(nn.Dense):
    """An override that calls super."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Inner(nn.Module):
    """A module with a child made in setup."""

    kind: type[nn.Dense] = nn.Dense

    def setup(self):
        self.child = self.kind(2)

    def __call__(self, x):
        return self.child(x)


def apply_with(interceptor, module, x=X, **options):
    variables = module.init(jax.random.key(0), x)
    with nn.intercept_methods(interceptor):
        return module.apply(variables, x, **options)


def test_interceptors_see_the_module_the_method_and_its_function():
    seen = []

    def intercept(next_function, args, kwargs, context):
        seen.append((context, args, dict(kwargs)))
        return next_function(*args, **kwargs)

    with relies_on("nn.intercept_methods", LINEN):
        apply_with(intercept, Inner(Scaled))
        names = [f"{type(c.module).__name__} {c.method_name}" for c, _, _ in seen]
        methods = "Inner setup", "Inner __call__", *["Scaled __call__"] * 2
        assert names == [*methods], names
    with relies_on("InterceptorContext.module", LINEN):
        assert all(isinstance(c.module.scope, Scope) for c, _, _ in seen)
        assert nn.Dense(2).scope is None
    with relies_on("InterceptorContext.orig_method, with super()", LINEN):
        for kind, (context, args, kwargs) in zip(
            (Scaled, nn.Dense), seen[2:], strict=True
        ):
            function = inspect.unwrap(context.orig_method.func)
            assert function is inspect.unwrap(kind.__call__)
            assert (len(args), kwargs) == (1, {})
    with relies_on("nn.module.InterceptorContext", LINEN):
        assert isinstance(context, nn.module.InterceptorContext)


def test_collections_are_put_into_the_root_scope_and_taken_out_of_it():
    found = {}

    def intercept(next_function, args, kwargs, context):
        scope = context.module.scope
        if not isinstance(context.module, nn.Dense):
            return next_function(*args, **kwargs)
        root, old = scope.root, scope.root.mutable
        with relies_on("Scope.path and Scope.root", LINEN):
            assert (tuple(scope.path), tuple(root.path)) == (("child",), ())
            assert root.root is root
        with relies_on("assignment to Scope.mutable", LINEN):
            scope.mutable = root.mutable = union_filters(old, ["probes", "inputs"])
            assert scope.is_mutable_collection("inputs")
        with relies_on("Scope.put_variable and Scope.get_variable", LINEN):
            root.put_variable("probes", "child", {"p": 1})
            assert scope.get_variable("probes", "p") == 1
            assert scope.get_variable("inputs", "i", ()) == ()
            scope.put_variable("inputs", "i", (2,))
        outputs = next_function(*args, **kwargs)
        with relies_on("Scope.variables", LINEN):
            variables = root.variables()
            assert variables["inputs"]["child"]["i"] == (2,)
            assert set(variables["params"]["child"]) == {"kernel", "bias"}
        root.mutable = subtract_filters(old, ["probes", "inputs"])
        found["done"] = True
        return outputs

    # Not while parameters are initialised, where everything is mutable.
    _, state = apply_with(intercept, Inner(), mutable=["own"])
    assert found
    with relies_on("what apply returns besides the outputs", LINEN):
        assert set(state) <= {"own"}


def test_filters_of_collections_are_sets():
    with relies_on("union_filters and subtract_filters", LINEN):
        for own in (False, True, "own", ["own"], ("own", "other")):
            scope = Scope({}, mutable=union_filters(own, ["inputs"]))
            assert scope.is_mutable_collection("inputs")
            assert scope.is_mutable_collection("own") == bool(own)
            closed = subtract_filters(scope.mutable, ["inputs"])
            assert not Scope({}, mutable=closed).is_mutable_collection("inputs")


def test_a_scope_has_the_level_of_its_trace():
    with relies_on("Scope.trace_level", LINEN, NNX):
        level = Scope({}).trace_level
        assert Scope({}).trace_level == level
        inside = []
        jax.make_jaxpr(lambda x: inside.append(Scope({}).trace_level) or x)(1.0)
        assert inside[0] != level


def test_an_rnn_takes_its_axes_from_an_attribute():
    with relies_on("nn.RNN.variable_axes", LINEN):
        rnn = nn.RNN(nn.SimpleCell(2))
        object.__setattr__(rnn, "variable_axes", {**rnn.variable_axes, "inputs": 0})
        assert rnn.variable_axes["inputs"] == 0


def test_a_norm_can_be_run_once_more_without_its_parameters():
    x = jnp.arange(6.0).reshape(2, 3)
    with relies_on("nn.Module.clone and nn.Module.variables", LAYERS_OF[LINEN]):
        norm = nn.LayerNorm()
        outputs, variables = norm.init_with_output(jax.random.key(0), x)
        assert set(norm.bind(variables).variables["params"]) == {"scale", "bias"}
        bare = norm.clone(parent=None, name=None, use_scale=False, use_bias=False)
        np.testing.assert_allclose(outputs, bare.apply({}, x), rtol=1e-6)
    with relies_on("nnx.clone and nnx.data", LAYERS_OF[NNX]):
        norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
        bare = nnx.clone(norm)
        bare.scale = bare.bias = nnx.data(None)
        np.testing.assert_allclose(bare(x), norm(x), rtol=1e-6)
        assert norm.scale is not None


CONV = "kernel_size strides padding kernel_dilation mask "
DILATED = CONV + "input_dilation feature_group_count "
ATTRIBUTES = {
    "nn.Dense": ((2,), "use_bias"),
    "nn.DenseGeneral": ((2,), "features axis batch_dims use_bias"),
    "nn.Einsum": (((3, 2), "ab,bc->ac"), "shape einsum_str use_bias"),
    "nn.Conv": ((2, (3,)), DILATED + "use_bias shared_weights"),
    "nn.ConvTranspose": ((2, (3,)), CONV + "transpose_kernel use_bias"),
    "nn.LayerNorm": ((), "feature_axes use_scale use_bias"),
    "nn.RMSNorm": ((), "feature_axes use_scale"),
    "nn.GroupNorm": ((), "use_scale use_bias"),
    "nn.BatchNorm": ((), "axis use_scale use_bias"),
    "nn.InstanceNorm": ((), "feature_axes use_scale use_bias"),
    "nnx.Linear": ((3, 2), "kernel bias"),
    "nnx.LinearGeneral": ((3, (2, 4)), "kernel bias axis batch_axis out_features"),
    "nnx.Einsum": (("ab,bc->ac", (3, 2), (2,)), "kernel bias einsum_str kernel_shape"),
    "nnx.Conv": ((3, 2, (3,)), DILATED + "kernel bias"),
    "nnx.ConvTranspose": ((3, 2, (3,)), CONV + "kernel bias transpose_kernel"),
    "nnx.Embed": ((7, 2), "embedding"),
    "nnx.LayerNorm": ((3,), "scale bias feature_axes"),
    "nnx.RMSNorm": ((3,), "scale feature_axes"),
    "nnx.GroupNorm": ((4, 2), "scale bias"),
    "nnx.BatchNorm": ((3,), "scale bias axis mean var"),
    "nnx.InstanceNorm": ((3,), "scale bias feature_axes"),
    "nnx.PReLU": ((), "negative_slope"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_layers_have_the_attributes_that_describe_them(name):
    args, expected = ATTRIBUTES[name]
    library, layers = (nn, LINEN) if name.startswith("nn.") else (nnx, NNX)
    options = {"rngs": nnx.Rngs(0)} if library is nnx and args else {}
    with relies_on(f"the attributes of {name}", LAYERS_OF[layers], DESCRIBE):
        module = getattr(library, name.partition(".")[2])(*args, **options)
        missing = [key for key in expected.split() if not hasattr(module, key)]
        assert not missing, f"no attribute {missing}"


# --------------------------------------------------------------------------- NNX


class Captured(nnx.Variable):
    """A kind of variable of our own."""


class Pair(nnx.Module):
    """Two layers, of which the second is called twice."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.second(self.first(x)))


def merged():
    return nnx.merge(*nnx.split(Pair(), nnx.Param, ...))


def test_modules_are_split_by_kind_and_merged_from_arrays():
    with relies_on("nnx.split and nnx.merge", MODULE, NNX):
        module = Pair()
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        assert isinstance(params, nnx.State)
        assert isinstance(graphdef, nnx.GraphDef)
        arrays = jax.tree.map(
            lambda x: x.get_raw_value(),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
        copy = nnx.merge(graphdef, arrays, rest)
        np.testing.assert_allclose(copy(X), module(X), rtol=1e-6)
    with relies_on("nnx.GraphDef's equality", MODULE):
        again, *_ = nnx.split(module, nnx.Param, ...)
        assert again == graphdef
        assert hash(again) == hash(graphdef)
        assert len(repr(graphdef).splitlines()) > 1


def test_modules_are_found_by_path_and_variables_among_their_attributes():
    with relies_on("nnx.iter_modules", NNX):
        found = {tuple(map(str, path)): m for path, m in nnx.iter_modules(merged())}
        assert {(), ("first",), ("second",)} <= set(found)
        assert isinstance(found[()], Pair)
    with relies_on("the attributes of nnx modules", NNX, TAG_LAYER):
        values = vars(found["first",])
        assert isinstance(values["kernel"], nnx.Param)
        assert isinstance(values["bias"].get_raw_value(), jax.Array)
    with relies_on("nnx.state and its filters", NNX, MODULE):
        module = merged()
        state = nnx.state(module, nnx.Not(nnx.Param))
        assert not jax.tree.leaves(state)
        assert len(jax.tree.leaves(nnx.state(module))) == 4
        nnx.update(module, nnx.state(Pair()))


def test_a_copy_gets_another_class_and_a_variable_more():
    seen = []

    def call(self, x):
        seen.append(vars(self)["site"])
        return nnx.Linear.__call__(self, x)

    with relies_on("the classes of nnx modules", NNX):
        tapped = type(nnx.Linear)("Linear", (nnx.Linear,), {"__call__": call})
        module = merged()
        object.__setattr__(module.second, "__class__", tapped)
        module.second.rows = Captured({"rows": {}})
        module.second.site = (0, ("second",))
        np.testing.assert_allclose(module(X), Pair()(X), rtol=1e-6)
        assert seen == [(0, ("second",))] * 2
        assert type(Pair().second) is nnx.Linear
    with relies_on("nnx.Variable.get_value and set_value", NNX):
        variable = vars(module.second)["rows"]
        value = variable.get_value()
        variable.set_value({**value, "rows": {**value["rows"], "x#0": (X,)}})
        assert set(variable.get_value()["rows"]) == {"x#0"}
    with relies_on("removal of a variable", NNX):
        del module.second.rows
        assert "rows" not in vars(module.second)


def test_variables_grow_inside_nnx_transforms_and_in_no_other_trace():
    def sow(module, x):
        value = module.first.rows.get_value()
        module.first.rows.set_value({"rows": {**value["rows"], "x": (x,)}})
        return module(x)

    with relies_on("variables whose trees grow inside nnx.jit and nnx.remat", NNX):
        for transform in (nnx.jit, nnx.remat):
            module = merged()
            module.first.rows = Captured({"rows": {}})
            transform(sow)(module, X)
            assert set(module.first.rows.get_value()["rows"]) == {"x"}
    with (
        relies_on("errors.TraceContextError", NNX),
        pytest.raises(errors.TraceContextError, match="a different trace level"),
    ):
        jax.jit(lambda x: sow(module, x))(X)


def test_axes_of_state_are_a_mapping_that_can_be_extended():
    with relies_on("nnx.StateAxes", NNX, LAYERS_OF[NNX]):
        axes = nnx.StateAxes({...: nnx.Carry})
        more = nnx.StateAxes({Captured: 0, **axes})
        assert dict(more) == {Captured: 0, ...: nnx.Carry}
    with relies_on("nnx.RNN.state_axes", NNX):
        rnn = nnx.RNN(nnx.SimpleCell(3, 2, rngs=nnx.Rngs(0)))
        assert ... in rnn.state_axes
        rnn.state_axes = nnx.StateAxes({Captured: 0, **rnn.state_axes})
        assert rnn(jnp.ones((2, 5, 3))).shape == (2, 5, 2)


def test_every_hook_names_a_file_that_exists():
    folder = pathlib.Path(optax_cgfac.__file__).parent
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'"([a-z_/]+\.py)"', source))
    assert len(named) >= 6
    assert all((folder / name).exists() for name in named)
