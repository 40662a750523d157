"""How solves ended: by one of them, and by the last ones of all layers."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cgfac.utils.types import Array, PyTree


class StopReason(enum.IntEnum):
    """Why a solve ended, an int32 in the states; the larger, the worse.

    Attributes:
      UNSOLVED: Nothing has been solved so far.
      CONVERGED: The true residual fell to the tolerance.
      DIRECT: By a factorization: exact but for rounding.
      EIGENPAIRS: With the leading eigenpairs of the factors: exact but for the others.
      STEP_LIMIT: After the largest number of iterations.
      STAGNATED: Rounding left nothing to gain.
      INDEFINITE: The operator or the preconditioner is not positive definite.
      NOT_FINITE: A number was not finite, or overflowed.

    Example:
      >>> import jax.numpy as jnp
      >>> StopReason(int(jnp.array(4, jnp.int32))).name
      'STEP_LIMIT'
    """

    UNSOLVED = 0
    CONVERGED = 1
    DIRECT = 2
    EIGENPAIRS = 3
    STEP_LIMIT = 4
    STAGNATED = 5
    INDEFINITE = 6
    NOT_FINITE = 7


UNKNOWN = -1.0
"""The residual of a solve that did not compute it."""

# The true residual may be larger than the recurrence's by this factor for a solve to
# count as converged: well above their difference where rounding does not matter.
AGREEMENT = 1.1


class CGInfo(NamedTuple):
    """How a solve ended.

    Attributes:
      num_steps: Iterations done, int32.
      residual_norm: Euclidean norm of the true residual ``b - F x``, recomputed from
        the solution; -1 where that was not done (direct solves).
      converged: Whether ``residual_norm`` is within the tolerance; true for direct
        solves that did not compute it.
      reason: Why it ended, a `StopReason` as int32.
    """

    num_steps: Array
    residual_norm: Array
    converged: Array
    reason: Array


def direct_info(dtype: Any, reason: StopReason = StopReason.DIRECT) -> CGInfo:
    """Returns the info of a solve without iterations, whose residual is unknown."""
    return CGInfo(
        jnp.zeros((), jnp.int32),
        jnp.asarray(UNKNOWN, dtype),
        jnp.array(reason is StopReason.DIRECT),
        jnp.array(reason.value, jnp.int32),
    )


class SolveInfo(NamedTuple):
    """How the last solve of every layer went: vectors over the parameters' leaves.

    Vectors and not trees like the parameters: what Optax's tools find in such trees
    they take for one array per parameter, with its shape and sharding. A layer's
    kernel and bias hold the same numbers; of stacked layers, the worst.

    Attributes:
      num_steps: CG iterations, int32; 0 for direct solves.
      residual: Norm of the true residual relative to the gradient's; -1 where it was
        not computed, as of direct solves.
      num_replaced: Solves so far whose result was not finite and was replaced.
      reason: Why the solve ended, a `StopReason` as int32.
      num_dropped: Captured rows so far that were not finite and were left out.
    """

    num_steps: Array
    residual: Array
    num_replaced: Array
    reason: Array
    num_dropped: Array


def init_info(params: PyTree) -> SolveInfo:
    """Returns the info of before the first solve."""
    shape = (len(jax.tree.leaves(params)),)
    return SolveInfo(
        num_steps=jnp.zeros(shape, jnp.int32),
        residual=jnp.full(shape, UNKNOWN, jnp.float32),
        num_replaced=jnp.zeros(shape, jnp.int32),
        reason=jnp.full(shape, StopReason.UNSOLVED.value, jnp.int32),
        num_dropped=jnp.zeros(shape, jnp.int32),
    )
