"""Small Linen models for the capture tests, each with what must be found in it.

Every builder is listed in `CASES`; a case knows how to apply the model, the
parameters and a batch, and which layers with how many positions are covered.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core
from flax import linen as nn

import optax_cgfac

NUM_EXAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its parameters and a batch.

    Attributes:
      model_fn: ``(params, inputs) -> outputs``, examples first.
      params: The parameters in whatever form the case is about.
      inputs: Any pytree.
      layers: The layers that must be covered: kind and positions by name.
      layouts: Functions from a layer's matrix (inputs, outputs) to a leaf, by the
        leaf's name, where `rebuild_gradients` cannot know the layout.
      input_axes: As in `fisher_estimator`.
    """

    model_fn: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    layers: dict[str, tuple[str, int]]
    layouts: dict[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    input_axes: Any = "auto"

    def loss(self, params, inputs):
        outputs = self.model_fn(params, inputs).astype(jnp.float32)
        return jnp.mean(jnp.sum(outputs.reshape(NUM_EXAMPLES, -1) ** 2, -1))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(model, inputs, **kwargs):
    """Parameters with biases that are not zero."""
    variables = jax.jit(lambda: model.init(jax.random.key(1), inputs, **kwargs))()
    leaves, structure = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def plain(model, inputs, layers) -> Case:
    """The usual way: params from ``init``, ``model.apply`` inside ``model_fn``."""
    return Case(
        lambda params, x: model.apply({"params": params}, x),
        init(model, inputs),
        inputs,
        layers,
    )


def dense(rank, use_bias):
    inputs = normal(0, *(NUM_EXAMPLES, 3, 2)[: rank - 1], 5)
    positions = {2: 1, 3: 3, 4: 6}[rank]
    return plain(nn.Dense(4, use_bias=use_bias), inputs, {".": ("dense", positions)})


def dense_general(features, axis, shape, positions, **kwargs):
    model = nn.DenseGeneral(features, axis=axis, **kwargs)
    inputs = normal(0, NUM_EXAMPLES, *shape)
    return plain(model, inputs, {".": ("dense_general", positions)})


class Heads(nn.Module):
    """A kernel for each head: ``batch_dims`` must lead, the batch comes second."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = x.swapaxes(0, 1)
        layer = nn.DenseGeneral(
            (2, 3), axis=-1, batch_dims=0, use_bias=self.use_bias, name="heads"
        )
        return layer(x).swapaxes(0, 1)


def batched_kernels(use_bias):
    model = Heads(use_bias)
    inputs = normal(0, NUM_EXAMPLES, 2, 5)
    return plain(model, inputs, {"heads": ("dense_general", 1)})


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


class Setup(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(4)
        self.decoders = [nn.Dense(3), nn.Dense(3, use_bias=False)]

    def __call__(self, x):
        code = nn.tanh(self.encoder(x))
        return self.decoders[0](code) + self.decoders[1](nn.tanh(code))


class Outer(nn.Module):
    """Puts a lifted class between two plain layers."""

    inner: Any

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="first")(x))
        x = self.inner(name="inner")(x)
        return nn.Dense(2, name="last")(nn.tanh(x))


BATCH = normal(0, NUM_EXAMPLES, 5)
IN_OUTER = {
    "first": ("dense", 1),
    "inner/Dense_0": ("dense", 1),
    "inner/Dense_1": ("dense", 1),
    "last": ("dense", 1),
}
COMPACT = {"Dense_0": ("dense", 1), "Dense_1": ("dense", 1)}


def compact():
    return plain(Compact(), BATCH, COMPACT)


def setup():
    names = ("encoder", "decoders_0", "decoders_1")
    return plain(Setup(), BATCH, dict.fromkeys(names, ("dense", 1)))


def outer(inner):
    return plain(Outer(inner), BATCH, IN_OUTER)


class RematMethod(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


class Block(nn.Module):
    """The body of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(4)(x)), None


def scanned(block, length, axes=True):
    return nn.scan(
        block,
        variable_axes={"params": 0} | (optax_cgfac.capture_axes() if axes else {}),
        split_rngs={"params": True},
        length=length,
    )


class Scanned(nn.Module):
    """Stacked layers, with or without the capture's collections among the axes."""

    axes: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, _ = scanned(block, 3, self.axes)(name="blocks")(x, None)
        return nn.Dense(2, name="last")(x)


class OuterBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.tanh(nn.Dense(4, name="mix")(x))
        x, _ = scanned(Block, 2)(name="blocks")(x, None)
        return x, None


class NestedScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return scanned(OuterBlock, 3)(name="outer")(x, None)[0]


class Cell(nn.Module):
    """A recurrent cell: the same parameters at each time."""

    @nn.compact
    def __call__(self, carry, x):
        carry = nn.tanh(nn.Dense(3, name="in")(x) + nn.Dense(3, name="rec")(carry))
        return carry, carry


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.scan(
            Cell,
            variable_broadcast="params",
            variable_axes=optax_cgfac.capture_axes(),
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        _, y = cell(name="cell")(jnp.zeros((x.shape[0], 3)), x)
        return nn.Dense(2, name="last")(y)


class Ensemble(nn.Module):
    """Members with parameters of their own, on the same examples."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Compact,
            variable_axes={"params": 0} | optax_cgfac.capture_axes(),
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=3,
        )
        return members(name="members")(x)


class SharedVmap(nn.Module):
    """One set of parameters, mapped over positions."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            Compact,
            variable_axes={"params": None} | optax_cgfac.capture_axes(),
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return mapped(name="mapped")(x)


class SharedTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(5, name="shared")
        return nn.Dense(2, name="last")(shared(nn.tanh(shared(x))))


class Normalised(nn.Module):
    """Running statistics in a mutable collection."""

    @nn.compact
    def __call__(self, x, train):
        # No bias: the mean of the batch is taken off again, its gradient is zero.
        x = nn.Dense(4, use_bias=False, name="first")(x)
        x = nn.BatchNorm(
            use_running_average=not train, use_bias=False, use_scale=False
        )(x)
        return nn.Dense(2, name="last")(x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, name="first")(x))
        return nn.Dense(2, name="last")(x)


class Doubled(nn.Dense):
    """A subclass that calls its parent."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Subclassed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Doubled(2, name="last")(nn.tanh(Doubled(4, name="first")(x)))


FIRST_LAST = {"first": ("dense", 1), "last": ("dense", 1)}


def shared_vmap():
    layers = {"mapped/Dense_0": ("dense", 3), "mapped/Dense_1": ("dense", 3)}
    return plain(SharedVmap(), normal(0, NUM_EXAMPLES, 3, 5), layers)


def recurrent():
    layers = {"cell/in": ("dense", 3), "cell/rec": ("dense", 3), "last": ("dense", 3)}
    return plain(Recurrent(), normal(0, NUM_EXAMPLES, 3, 5), layers)


def ensemble():
    layers = {"members/Dense_0": ("dense", 1), "members/Dense_1": ("dense", 1)}
    return plain(Ensemble(), BATCH, layers)


def nested_scan():
    names = ("first", "outer/mix", "outer/blocks/Dense_0")
    return plain(NestedScan(), BATCH, dict.fromkeys(names, ("dense", 1)))


def scan(remat=False):
    layers = FIRST_LAST | {"blocks/Dense_0": ("dense", 1)}
    return plain(Scanned(remat=remat), BATCH, layers)


def shared_twice():
    layers = {"shared": ("dense", 2), "last": ("dense", 1)}
    return plain(SharedTwice(), BATCH, layers)


def applied_twice():
    model = nn.Dense(5)

    def model_fn(params, x):
        return model.apply(
            {"params": params}, nn.tanh(model.apply({"params": params}, x))
        )

    return Case(model_fn, init(model, BATCH), BATCH, {".": ("dense", 2)})


def two_models():
    a, b = Compact(), nn.Dense(2)

    def model_fn(params, x):
        return b.apply({"params": params["b"]}, a.apply({"params": params["a"]}, x))

    params = {"a": init(a, BATCH), "b": init(b, normal(0, NUM_EXAMPLES, 3))}
    layers = {"a/Dense_0": ("dense", 1), "a/Dense_1": ("dense", 1), "b": ("dense", 1)}
    return Case(model_fn, params, BATCH, layers)


def mutable_collections():
    model = Normalised()
    variables = model.init(jax.random.key(1), BATCH, train=True)
    inputs = {"x": BATCH, "batch_stats": variables["batch_stats"]}

    def model_fn(params, inputs):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": inputs["batch_stats"]},
            inputs["x"],
            train=True,
            mutable=["batch_stats"],
        )
        # The user's own state must come back as without capture.
        assert set(updated) == {"batch_stats"}, set(updated)
        return outputs

    return Case(model_fn, init(model, BATCH, train=True), inputs, FIRST_LAST)


def dropout():
    model = Dropped()
    inputs = {"x": BATCH, "key": jax.random.key(7)}

    def model_fn(params, inputs):
        rngs = {"dropout": inputs["key"]}
        return model.apply({"params": params}, inputs["x"], rngs=rngs)

    variables = model.init(
        {"params": jax.random.key(1), "dropout": inputs["key"]}, BATCH
    )
    return Case(model_fn, variables["params"], inputs, FIRST_LAST)


def frozen_dict():
    case = compact()
    return dataclasses.replace(case, params=core.freeze(case.params))


def partitioned():
    def boxed(init_fn, axes):
        return nn.with_partitioning(init_fn, axes)

    model = nn.Dense(
        4,
        kernel_init=boxed(nn.initializers.lecun_normal(), (None, "model")),
        bias_init=boxed(nn.initializers.normal(), ("model",)),
    )
    return plain(nn.Sequential([model]), BATCH, {"layers_0": ("dense", 1)})


def whole_variables():
    model = Compact()
    variables = {"params": init(model, BATCH)}
    layers = {f"params/{name}": facts for name, facts in COMPACT.items()}
    return Case(model.apply, variables, BATCH, layers)


def cast_on_the_way():
    model = Compact()

    def model_fn(params, x):
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return model.apply({"params": cast}, x.astype(jnp.bfloat16))

    return Case(model_fn, init(model, BATCH), BATCH, COMPACT)


CASES: dict[str, Callable[[], Case]] = {
    "dense rank 2": lambda: dense(2, True),
    "dense rank 3": lambda: dense(3, True),
    "dense rank 4": lambda: dense(4, True),
    "dense rank 2 without bias": lambda: dense(2, False),
    "dense rank 3 without bias": lambda: dense(3, False),
    "dense rank 4 without bias": lambda: dense(4, False),
    "dense_general": lambda: dense_general(4, -1, (3, 5), 3),
    "dense_general two axes": lambda: dense_general(4, (-2, -1), (3, 5), 1),
    "dense_general inner axis": lambda: dense_general(4, 1, (3, 5), 5),
    "dense_general axes in another order": lambda: dense_general(
        4, (3, 1), (3, 2, 5), 2
    ),
    "dense_general two features": lambda: dense_general((2, 3), -1, (3, 5), 3),
    "dense_general axes and features": lambda: dense_general(
        (2, 3), (-2, -1), (2, 3, 5), 2
    ),
    "dense_general without bias": lambda: dense_general(
        (2, 3), (-2, -1), (3, 5), 1, use_bias=False
    ),
    "dense_general batch_dims": lambda: batched_kernels(True),
    "dense_general batch_dims without bias": lambda: batched_kernels(False),
    "compact": compact,
    "setup": setup,
    "sequential": lambda: plain(
        nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]),
        BATCH,
        {"layers_0": ("dense", 1), "layers_2": ("dense", 1)},
    ),
    "jit class": lambda: outer(nn.jit(Compact)),
    "jit method": lambda: outer(JitMethod),
    "remat class": lambda: outer(nn.remat(Compact)),
    "remat method": lambda: outer(RematMethod),
    "scan": scan,
    "scan of remat": lambda: scan(remat=True),
    "nested scan": nested_scan,
    "scan over time": recurrent,
    "vmap": ensemble,
    "vmap with shared parameters": shared_vmap,
    "shared module": shared_twice,
    "applied twice": applied_twice,
    "two models": two_models,
    "mutable collections": mutable_collections,
    "dropout": dropout,
    "frozen dict": frozen_dict,
    "partitioned": partitioned,
    "whole variables": whole_variables,
    "subclass": lambda: plain(Subclassed(), BATCH, FIRST_LAST),
    "cast on the way": cast_on_the_way,
}


def rebuild_gradients(curvature, like, layouts=None):
    """The gradient of every covered leaf as ``aᵀg / N``, in float64 by NumPy.

    Shares no code with the package: where the inverse of its matrix form were wrong,
    this would not be.
    """
    shapes = {
        "/".join(_names(path)): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    rebuilt = {}
    for tag in curvature.tags:
        a, g = curvature.layers[tag.name]
        a, g = _dense_rows(a), np.asarray(g, np.float64)
        matrix = np.einsum("...ri,...ro->...io", a, g) / NUM_EXAMPLES
        if tag.kernel is None:
            start = 0
            for path in tag.leaves:
                shape = shapes["/".join(path)]
                end = start + (shape[-1] if shape else 1)
                part = matrix[..., 0, start:end]
                rebuilt["/".join(path)] = part.reshape(shape)
                start = end
            assert start == matrix.shape[-1]
            continue
        kernel = "/".join(tag.kernel)
        if tag.bias is not None:
            bias = "/".join(tag.bias)
            rebuilt[bias] = matrix[..., -1, :].reshape(shapes[bias])
            matrix = matrix[..., :-1, :]
        if layouts and kernel in layouts:
            matrix = layouts[kernel](matrix)
        elif tag.kind.startswith("conv"):
            matrix = _conv_kernel(matrix, shapes[kernel])
        elif tag.kind == "attend" or tag.kind.startswith("embed"):
            assert matrix.shape == shapes[kernel]
        rebuilt[kernel] = matrix.reshape(shapes[kernel])
    return rebuilt


def _conv_kernel(matrix, shape):
    """``(taps · c, o)`` to the kernel: ``(*taps, c, o)``, groups or transposed."""
    num_groups = shape[-1] // matrix.shape[-1]
    if num_groups > 1 and matrix.shape[:-2][-1:] == (num_groups,):
        # (groups, taps · c, o) -> (taps · c, groups, o)
        return np.moveaxis(matrix, -3, -2)
    if shape[-2] == matrix.shape[-1] != shape[-1]:  # transposed: (*taps, o, c)
        return matrix.reshape(-1, shape[-1], shape[-2]).swapaxes(-1, -2)
    return matrix


def _dense_rows(a):
    """Rows as an array, one-hot ones spelled out."""
    if hasattr(a, "top"):
        return np.concatenate([_dense_rows(a.top), _dense_rows(a.bottom)], -2)
    if hasattr(a, "indices"):
        one_hot = np.eye(a.size)[np.asarray(a.indices)]
        return one_hot * np.asarray(a.weights, np.float64)[..., None]
    return np.asarray(a, np.float64)


def assert_close(actual, expected, tolerance, zeros=()):
    """Compares leaves by the norm of their difference; some may be rounding alone."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        norm = np.linalg.norm(value)
        if name in zeros:
            assert np.abs(actual[name]).max() < 1e-5
            continue
        assert norm > 0, f"{name}: the case shows nothing, its gradient is zero"
        difference = np.linalg.norm(np.asarray(actual[name]) - value)
        assert difference <= tolerance * norm, (name, difference / norm)


def by_name(tree):
    return {
        "/".join(_names(path)): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _names(path):
    names = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
    return names[:-1] if names[-1] == "value" else names
