"""`tag_layer` captures layers of the user's own modules."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from optax_cgfac.capture.describe import dense_call, elementwise_call
from optax_cgfac.capture.linen.tap import tag_linen
from optax_cgfac.capture.nnx.tap import tag_nnx
from optax_cgfac.utils.types import Array


def tag_layer(
    module: Any,
    x: Array,
    y: Array,
    *,
    kernel: str | None = None,
    scale: str | None = None,
    bias: str | None = None,
) -> Array:
    r"""Captures parameters of your own module as a layer.

    A layer is a matrix, ``y = x @ kernel + bias`` on the last axis, or elementwise,
    ``y = scale * x + bias``, with scale and bias on the last axis (or a scalar scale).
    Call it where ``y`` is computed, once for each layer of the module, and continue
    with the ``y`` that it returns.

    Args:
      module: The Linen or NNX module, ``self``.
      x: The input that the parameters act on, shape ``(N, ..., n_in)``.
      y: The output, shape ``(N, ..., n_out)``.
      kernel: Name of the matrix, shape ``(n_in, n_out)``, among the module's
        parameters; in NNX, its attributes.
      scale: Name of the elementwise factor.
      bias: Name of the bias.

    Returns:
      ``y``.

    Raises:
      ValueError: If the names or shapes do not fit.

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
    """
    names = {"kernel": kernel, "scale": scale, "bias": bias}
    if (kernel is None) == (scale is None) and (kernel is not None or bias is None):
        raise ValueError(
            "tag_layer takes kernel= (with or without bias=), or scale= and bias= or "
            f"one of them; got {names}. Call it once for each layer of the module."
        )
    params = _params_of(module)
    absent = [name for name in names.values() if name and name not in params]
    if absent:
        raise ValueError(
            f"{type(module).__name__} has no parameter {', '.join(absent)}; it has "
            f"{', '.join(params) or 'none'}. Pass the name that self.param or the "
            "attribute has."
        )
    shapes = {role: jnp.shape(params[name]) for role, name in names.items() if name}
    _check_shapes(jnp.shape(x), jnp.shape(y), shapes)
    if kernel is not None:
        call, a = dense_call(x, bias, kind="custom", kernel=kernel)
    else:
        ndim = max(map(len, shapes.values()))
        call, a = elementwise_call(
            jnp.broadcast_to(x, y.shape), "custom", scale, bias, param_ndim=ndim
        )
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
                f"{expected[role]}, got {shape}. Pass the x and y between which the "
                "parameters act."
            )
