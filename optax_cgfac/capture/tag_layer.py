"""`tag_layer`: how a module of the user's own makes a layer known."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac.capture.describe import describe_dense, describe_elementwise
from optax_cgfac.capture.linen.tap import tag_linen
from optax_cgfac.capture.nnx.tap import tag_nnx
from optax_cgfac.utils.types import Array
from optax_cgfac.utils.validate import summarize


def tag_layer(
    module: Any,
    x: Array,
    y: Array,
    *,
    kernel: str | None = None,
    scale: str | None = None,
    bias: str | None = None,
) -> Array:
    r"""Makes parameters of a user's own module known as a layer.

    Either a matrix, ``y = x @ kernel + bias`` on the last axis, or elementwise,
    ``y = scale * x + bias``, with scale and bias on the last axis (or scalars). Call it
    where ``y`` is computed, once for each layer of the module, and go on with what it
    returns: the same ``y``, which capture can see.

    Args:
      module: The Linen or NNX module, ``self``.
      x: The input that the parameters act on, shape ``(N, ..., n_in)``.
      y: The output, shape ``(N, ..., n_out)``.
      kernel: Name of the matrix among the module's parameters, shape
        ``(n_in, n_out)``.
      scale: Name of the elementwise factor.
      bias: Name of the bias.

    Returns:
      ``y``.

    Raises:
      ValueError: If the names or shapes do not fit.
      TypeError: If ``module`` is no Flax module, or a name none.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> class Scale(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
      ...         return optax_cgfac.tag_layer(self, x, scale * x, scale="scale")
      >>> model = nn.Sequential([nn.Dense(3), Scale()])
      >>> x = jnp.ones((4, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = optax_cgfac.fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x), "squared_error", examples=4
      ... )
      >>> [tag.kind for tag in estimator.init(params, x).tags]
      ['dense', 'custom']

      In NNX the names are those of the module's attributes:

      >>> from flax import nnx
      >>> class Shift(nnx.Module):
      ...     def __init__(self, features):
      ...         self.shift = nnx.Param(jnp.zeros(features))
      ...
      ...     def __call__(self, x):
      ...         return optax_cgfac.tag_layer(self, x, x + self.shift, bias="shift")
      >>> estimator = optax_cgfac.fisher_estimator(
      ...     lambda m, x: m(x), "squared_error", examples=4
      ... )
      >>> [tag.kind for tag in estimator.init(Shift(2), x).tags]
      ['custom']
    """
    names = {"kernel": kernel, "scale": scale, "bias": bias}
    for role, name in names.items():
        if not isinstance(name, str | None):
            raise TypeError(
                f"tag_layer: {role}= must be the name of a parameter, got "
                f"{summarize(name)}. Pass {role}='{role}', say, and not the parameter."
            )
    if (kernel is None) == (scale is None) and (kernel is not None or bias is None):
        raise ValueError(
            "tag_layer takes kernel= (with or without bias=), or scale= and bias= or "
            f"one of them; got {names}. Call it once for each layer of the module."
        )
    if not isinstance(module, (nn.Module, nnx.Module)):
        raise TypeError(
            "tag_layer takes a Flax module, usually self; got "
            f"{type(module).__name__}. Call tag_layer(self, x, y, kernel='kernel') "
            "inside its method."
        )
    if isinstance(module, nn.Module) and module.scope is None:
        raise ValueError(
            "tag_layer takes a module that is being applied, got an unbound "
            f"{type(module).__name__}. Call tag_layer(self, x, y, kernel='kernel') "
            "inside its method."
        )
    for argument, array in (("x", x), ("y", y)):
        if not hasattr(array, "shape") or array.shape == ():
            raise TypeError(
                f"tag_layer: {argument} must be an array of shape (N, ..., features), "
                f"got {summarize(array)}. Pass the layer's input and its output."
            )
    params = _params_of(module)
    shapes = {
        role: jnp.shape(params[name])
        for role, name in names.items()
        if name is not None and name in params
    }
    absent = [name for name in names.values() if name and name not in params]
    if absent:
        raise ValueError(
            f"{type(module).__name__} has no parameter {', '.join(absent)}; it has "
            f"{', '.join(params) or 'none'}. Pass the name that self.param or the "
            "attribute has."
        )
    _check_shapes(jnp.shape(x), jnp.shape(y), shapes)
    if kernel is not None:
        described = describe_dense(x, bias=bias is not None)
    else:
        ndim = max(len(shape) for shape in shapes.values())
        described = describe_elementwise(
            jnp.broadcast_to(x, y.shape),
            kind="custom",
            scale=scale,
            bias=bias,
            param_ndim=ndim,
        )
    if isinstance(described, str):
        raise ValueError(described)
    call, a = described
    call = dataclasses.replace(call, kind="custom", kernel=kernel, bias=bias)
    if isinstance(module, nn.Module):
        return tag_linen(module, call, a, y)
    return tag_nnx(module, call, a, y)


def _params_of(module: Any) -> Mapping[str, Any]:
    if isinstance(module, nn.Module):
        return module.variables.get("params", {})
    return {
        name: value.get_value()
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param)
    }


def _check_shapes(
    x: tuple[int, ...], y: tuple[int, ...], params: dict[str, tuple[int, ...]]
) -> None:
    expected = {"scale": y[-1:], "bias": y[-1:], "kernel": x[-1:] + y[-1:]}
    for role, shape in params.items():
        scalar = shape == () and role == "scale" and "bias" not in params
        if shape != expected[role] and not scalar:
            raise ValueError(
                f"tag_layer: with x {x} and y {y} the {role} must have shape "
                f"{expected[role]}, got {shape}. Pass the x and y between which this "
                "parameter acts."
            )
    if x[:-1] != y[:-1]:
        raise ValueError(
            f"tag_layer: x and y must agree on all axes but the last, got {x} and {y}. "
            "Pass the x and y between which the parameters act."
        )
