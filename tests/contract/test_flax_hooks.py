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
from flax.training import train_state

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


class Inner(nn.Module):
    """A module with a child made in setup."""

    def setup(self):
        self.child = nn.Dense(2)

    def __call__(self, x):
        return self.child(x)


def apply_with(interceptor, module, x=X, **options):
    variables = module.init(jax.random.key(0), x)
    with nn.intercept_methods(interceptor):
        return module.apply(variables, x, **options)


def recorder(seen):
    def intercept(next_function, args, kwargs, context):
        seen.append((context, args, dict(kwargs)))
        return next_function(*args, **kwargs)

    return intercept


def test_interceptors_see_the_module_the_method_and_its_function():
    seen = []
    with relies_on("nn.intercept_methods", LINEN):
        apply_with(recorder(seen), Inner())
        names = [(type(c.module).__name__, c.method_name) for c, _, _ in seen]
        expected = [("Inner", "setup"), ("Inner", "__call__"), ("Dense", "__call__")]
        assert names == expected, names
    with relies_on("InterceptorContext.module", LINEN):
        assert all(isinstance(c.module.scope, Scope) for c, _, _ in seen)
        assert nn.Dense(2).scope is None
    with relies_on("InterceptorContext.orig_method", LINEN):
        context, args, kwargs = seen[-1]
        function = inspect.unwrap(context.orig_method.func)
        assert function is inspect.unwrap(nn.Dense.__call__)
        assert (len(args), kwargs) == (1, {})
    with relies_on("nn.module.InterceptorContext", LINEN):
        assert isinstance(context, nn.module.InterceptorContext)


def test_the_interceptor_entered_last_runs_inside():
    outer, inner = [], []

    def both(next_function, args, kwargs, context):
        outer.append(len(inner))
        return next_function(*args, **kwargs)

    variables = nn.Dense(2).init(jax.random.key(0), X)
    with relies_on("the order of interceptors", LINEN):
        with nn.intercept_methods(both), nn.intercept_methods(recorder(inner)):
            nn.Dense(2).apply(variables, X)
        assert (outer, len(inner)) == ([0], 1)


def test_an_override_that_calls_super_is_intercepted_as_both():
    class Scaled(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    seen = []
    with relies_on("interception of super().__call__", LINEN):
        apply_with(recorder(seen), Scaled(2))
        found = [inspect.unwrap(c.orig_method.func) for c, _, _ in seen]
        assert inspect.unwrap(nn.Dense.__call__) in found
        assert inspect.unwrap(Scaled.__call__) in found


def test_collections_are_put_into_the_root_scope_and_taken_out_of_it():
    found = {}

    def intercept(next_function, args, kwargs, context):
        scope = context.module.scope
        if not isinstance(context.module, nn.Dense):
            return next_function(*args, **kwargs)
        root = scope.root
        with relies_on("Scope.path and Scope.root", LINEN):
            assert tuple(scope.path) == ("child",)
            assert tuple(root.path) == ()
            assert root.root is root
        old = root.mutable
        with relies_on("assignment to Scope.mutable", LINEN):
            root.mutable = union_filters(old, ["probes", "inputs"])
            scope.mutable = root.mutable
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


def sowing(next_function, args, kwargs, context):
    outputs = next_function(*args, **kwargs)
    if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
        context.module.scope.put_variable("inputs", "i", args[0])
    return outputs


@pytest.mark.parametrize("lift", [nn.scan, nn.vmap], ids=["scan", "vmap"])
def test_lifted_transforms_carry_collections_that_their_axes_name(lift):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, x=None):
            y = nn.Dense(3, name="child")(carry)
            return (y, None) if lift is nn.scan else y

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "inputs": 0}
            options = {"variable_axes": axes, "split_rngs": {"params": True}}
            if lift is nn.scan:
                return nn.scan(Body, length=2, **options)(name="body")(x)[0]
            return nn.vmap(Body, **options)(name="body")(x)

    with relies_on(f"the collections that nn.{lift.__name__} carries", LINEN):
        _, state = apply_with(sowing, Stack(), mutable=["inputs"])
        stacked = state["inputs"]["body"]["child"]["i"]
        assert len(stacked) == 2


def test_an_rnn_takes_its_axes_from_an_attribute():
    with relies_on("nn.RNN.variable_axes", LINEN):
        rnn = nn.RNN(nn.SimpleCell(2))
        object.__setattr__(rnn, "variable_axes", {**rnn.variable_axes, "inputs": 0})
        assert rnn.variable_axes["inputs"] == 0
    with relies_on("nn.RNN's scan over time", LINEN):
        x = jnp.ones((2, 5, 3))
        _, state = apply_with(sowing, rnn, x, mutable=["inputs"])
        leaves = jax.tree.leaves(state["inputs"])
        assert leaves
        assert all(leaf.shape[0] == 5 for leaf in leaves)


def test_a_layer_can_be_run_once_more_without_its_parameters():
    with relies_on("nn.Module.clone and nn.Module.variables", LAYERS_OF[LINEN]):
        norm, x = nn.LayerNorm(), jnp.arange(6.0).reshape(2, 3)
        outputs, variables = norm.init_with_output(jax.random.key(0), x)
        assert set(norm.bind(variables).variables["params"]) == {"scale", "bias"}
        bare = norm.clone(parent=None, name=None, use_scale=False, use_bias=False)
        np.testing.assert_allclose(outputs, bare.apply({}, x), rtol=1e-6)


CONV = "kernel_size strides padding kernel_dilation mask "
FIELDS = {
    "Dense": "use_bias",
    "DenseGeneral": "features axis batch_dims use_bias",
    "Einsum": "shape einsum_str use_bias",
    "Conv": CONV + "input_dilation feature_group_count use_bias",
    "ConvTranspose": CONV + "transpose_kernel use_bias",
    "LayerNorm": "feature_axes use_scale use_bias",
    "RMSNorm": "feature_axes use_scale",
    "GroupNorm": "use_scale use_bias",
    "BatchNorm": "axis use_scale use_bias",
    "InstanceNorm": "feature_axes use_scale use_bias",
}


@pytest.mark.parametrize("name", FIELDS)
def test_linen_layers_have_the_options_that_describe_them(name):
    kind = getattr(nn, name)
    with relies_on(f"the options of nn.{name}", LAYERS_OF[LINEN], DESCRIBE):
        assert set(FIELDS[name].split()) <= set(kind.__dataclass_fields__)
        assert hasattr(kind, "use_bias") == ("use_bias" in FIELDS[name])


def test_convolutions_say_whether_positions_share_the_kernel():
    with relies_on("shared_weights of nn.Conv", DESCRIBE):
        assert nn.Conv(2, (3,)).shared_weights
        assert not nn.ConvLocal(2, (3,)).shared_weights


def test_a_train_state_takes_keyword_arguments():
    with relies_on("flax.training.train_state.TrainState", "train_state.py"):
        fields = set(train_state.TrainState.__dataclass_fields__)
        assert {"step", "apply_fn", "params", "tx", "opt_state"} <= fields
        apply_gradients = inspect.signature(train_state.TrainState.apply_gradients)
        assert "grads" in apply_gradients.parameters


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
    graphdef, params, rest = nnx.split(Pair(), nnx.Param, ...)
    return nnx.merge(graphdef, params, rest)


def test_modules_are_split_by_kind_and_merged_from_arrays():
    with relies_on("nnx.split and nnx.merge", MODULE, NNX):
        module = Pair()
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        assert isinstance(params, nnx.State)
        assert isinstance(graphdef, nnx.GraphDef)
        arrays = jax.tree.map(
            lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x,
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


def test_nnx_transforms_carry_what_layers_sow():
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


def test_a_variable_of_an_outer_trace_cannot_be_set():
    with relies_on("errors.TraceContextError", NNX):
        variable = Captured({"rows": {}})

        def sow(x):
            variable.set_value({"rows": {"x": x}})
            return x

        message = "from a different trace level"
        with pytest.raises(errors.TraceContextError, match=message):
            jax.jit(sow)(X)


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


def test_a_norm_can_be_cloned_and_stripped():
    with relies_on("nnx.clone and nnx.data", LAYERS_OF[NNX]):
        norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
        x = jnp.arange(6.0).reshape(2, 3)
        bare = nnx.clone(norm)
        bare.scale = bare.bias = nnx.data(None)
        np.testing.assert_allclose(bare(x), norm(x), rtol=1e-6)
        assert norm.scale is not None


NNX_CONV = "kernel bias " + CONV
ATTRIBUTES = {
    "Linear": ((3, 2), "kernel bias"),
    "LinearGeneral": ((3, (2, 4)), "kernel bias axis batch_axis out_features"),
    "Einsum": (("ab,bc->ac", (3, 2), (2,)), "kernel bias einsum_str kernel_shape"),
    "Conv": ((3, 2, (3,)), NNX_CONV + "input_dilation feature_group_count"),
    "ConvTranspose": ((3, 2, (3,)), NNX_CONV + "transpose_kernel"),
    "Embed": ((7, 2), "embedding"),
    "LayerNorm": ((3,), "scale bias feature_axes"),
    "RMSNorm": ((3,), "scale feature_axes"),
    "GroupNorm": ((4, 2), "scale bias"),
    "BatchNorm": ((3,), "scale bias axis mean var"),
    "InstanceNorm": ((3,), "scale bias feature_axes"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_nnx_layers_have_the_attributes_that_describe_them(name):
    args, expected = ATTRIBUTES[name]
    with relies_on(f"the attributes of nnx.{name}", LAYERS_OF[NNX], DESCRIBE):
        module = getattr(nnx, name)(*args, rngs=nnx.Rngs(0))
        missing = [key for key in expected.split() if not hasattr(module, key)]
        assert not missing, f"no attribute {missing}"
        assert hasattr(nnx.PReLU(), "negative_slope")


def test_every_hook_names_a_file_that_exists():
    folder = pathlib.Path(optax_cgfac.__file__).parent
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'"([a-z_/]+\.py)"', source))
    assert len(named) >= 6
    assert all((folder / name).exists() for name in named)
