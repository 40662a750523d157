"""The Linen layers that capture covers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from optax_cgfac.capture import describe
from optax_cgfac.utils.types import Array

INPUTS, PROBES = "cgfac_inputs", "cgfac_probes"
"""The collections of capture."""


def _param(module: Any, name: str) -> str | None:
    return name if getattr(module, f"use_{name}", False) else None


def _normalize(module: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
    # RMSNorm has no bias, and no option for one.
    off = {f"use_{name}": False for name in ("scale", "bias") if _param(module, name)}
    bare = module.clone(parent=None, name=None, **off)
    state = {
        name: collection
        for name, collection in module.variables.items()
        if name not in ("params", INPUTS, PROBES)
    }
    return bare.apply(state, x, *args, mutable=list(state), **kwargs)[0]


_READER = describe.Reader(
    param=_param,
    batch_axes=lambda module: module.batch_dims,
    num_features=lambda module: (
        1 if isinstance(module.features, int) else len(module.features)
    ),
    kernel_ndim=lambda module: len(module.shape),
    normalize=_normalize,
)

# The function that runs, not the class: a subclass that overrides __call__ is a
# layer of its own, and its super().__call__() is intercepted as this one.
LAYERS: dict[Callable[..., Any], describe.Describe] = {
    inspect.unwrap(function): functools.partial(describer, _READER)
    for function, describer in (
        (nn.Dense.__call__, describe.dense),
        (nn.DenseGeneral.__call__, describe.dense_general),
        (nn.Einsum.__call__, describe.einsum),
        (nn.Conv.__call__, describe.conv),
        (nn.ConvTranspose.__call__, describe.conv_transpose),
        (nn.Embed.__call__, describe.embed),
        (nn.Embed.attend, describe.attend),
        (nn.LayerNorm.__call__, describe.norm),
        (nn.RMSNorm.__call__, describe.norm),
        (nn.GroupNorm.__call__, describe.norm),
        (nn.BatchNorm.__call__, describe.norm),
        (nn.InstanceNorm.__call__, describe.norm),
        (nn.PReLU.__call__, describe.prelu),
    )
}
