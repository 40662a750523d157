r"""The first damping, from the curvature of the first update.

A damping has the unit of the curvature: a loss that is ten times larger has ten times
the Fisher matrix and needs ten times the damping. Measured in the mean curvature

.. math:: \bar F = \frac{\sum_l \mathrm{tr} A_l \, \mathrm{tr} G_l}{\sum_l n_l},

with ``n`` the entries of a layer's parameters, one number serves all losses and models
but the smallest: of a few parameters all directions are about as curved as their mean,
and are known from a few examples. These start with less, and end with as much: on small
batches a damping far below the mean curvature lets their weights wander off
(benchmarks/LOG.md, 23).
"""

import math

import jax.numpy as jnp

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.utils.types import Array

# Of the mean curvature: it gives 0.1 for the autoencoder on CURVES, and a tenth or ten
# times that is worse there (benchmarks/LOG.md).
_MULTIPLE = 10.0


_FEW_PARAMETERS = 1000


# The damping may fall to this share of the typical one. Without a lower end a good
# reduction ratio on small batches, which rewards fitting the batch, lowers it until the
# loss turns up.
LOWEST_SHARE = 1e-2


def mean_curvature(curvature: Curvature) -> Array:
    """Returns the mean of the Fisher matrix's diagonal over all tagged parameters.

    Args:
      curvature: The curvature.

    Returns:
      A scalar, float32 or the layers' precision if higher; 0 without rows. A layer
      whose curvature is not finite counts as one without.
    """
    traces, size = [], 0
    for tag in curvature.tags:
        spectra = curvature.spectra.get(tag.name)
        if spectra is None:
            rows = curvature.layers[tag.name]
            trace = curvature.kronecker_operator(tag, rows).trace()
        else:
            trace = spectra.a.trace * spectra.g.trace
        traces.append(jnp.sum(jnp.where(jnp.isfinite(trace), trace, 0)))
        size += max(trace.size, 1) * tag.n_in * tag.n_out
    return sum(traces, start=jnp.zeros((), jnp.float32)) / size


def typical_damping(curvature: Curvature) -> Array:
    """Returns the damping to start from with a thousand parameters and more.

    Args:
      curvature: The curvature.

    Returns:
      Ten times the mean curvature; 0 where that is no number of use, as without rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optax_cgfac import fisher_estimator
      >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> estimator = fisher_estimator(
      ...     lambda p, x: model.apply({"params": p}, x),
      ...     "squared_error",
      ...     kind="exact",
      ...     rows=4,
      ... )
      >>> curvature = estimator.update(estimator.init(params, x), params, x)
      >>> print(f"{typical_damping(curvature):.3f}")  # the Hessian is 2 I
      20.000
    """
    damping = _MULTIPLE * mean_curvature(curvature)
    return jnp.where(jnp.isfinite(damping), damping, 0)


def first_share(curvature: Curvature) -> float:
    """Returns the share of the typical damping to start from: 1 but for few parameters.

    Args:
      curvature: The curvature.

    Returns:
      A number in ``[LOWEST_SHARE, 1]``, for fewer than a thousand parameters less in
      proportion.
    """
    size = sum(math.prod(shape) for tag in curvature.tags for shape in tag.shapes)
    return min(max(size / _FEW_PARAMETERS, LOWEST_SHARE), 1.0)
