"""The parameters that `cgfac` leaves to another optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.layers.layer import LEFT_OUT
from optax_cgfac.utils.paths import leaves_by_path, map_with_path, text
from optax_cgfac.utils.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Fallback:
    """The parameters that CG-FAC leaves to the fallback transformation."""

    fallback: optax.GradientTransformation | None
    where: Callable[[str], bool] | None

    def __post_init__(self):
        """Checks that both are given, or none."""
        if (self.fallback is None) != (self.where is None):
            given, absent = ("where", "fallback")[:: 1 if self.where else -1]
            raise ValueError(
                f"{given}= needs {absent}=, got None. Pass "
                "cgfac(fallback=optax.adam(1e-3), where=curvature.covers)."
            )

    def keeps(self, path: str) -> bool:
        """Whether CG-FAC updates the parameter."""
        return self.fallback is None or self.where is None or self.where(path)

    def transformation(self, params: PyTree) -> optax.GradientTransformationExtraArgs:
        """Returns the fallback, which lets the other parameters' updates through."""
        if self.fallback is None:
            return optax.with_extra_args_support(optax.identity())
        mask = map_with_path(lambda path, _: not self.keeps(text(path)), params)
        return optax.masked(optax.with_extra_args_support(self.fallback), mask)

    def split(self, kept: PyTree, others: PyTree) -> PyTree:
        """Returns a tree of CG-FAC's leaves of ``kept``, other leaves of ``others``."""
        return map_with_path(
            lambda path, x, y: x if self.keeps(text(path)) else y, kept, others
        )

    def apply(
        self, delta: PyTree, updates: PyTree, state: Any, finite: Array, /, **given: Any
    ) -> tuple[PyTree, Any]:
        """Lets the other optimizer update its parameters.

        A number that is not finite anywhere rejects the whole step, the fallback's part
        of it too. Those that the fallback makes itself (Adam's in float16) are zeroed.

        Args:
          delta: CG-FAC's update.
          updates: The gradients.
          state: The fallback's state.
          finite: Whether all numbers of the step are finite.
          **given: ``params`` and the other arguments of the fallback's ``update``.
        """
        if self.fallback is None:
            return delta, state
        other = self.transformation(given["params"])
        mixed, new = other.update(self.split(delta, updates), state, **given)
        mixed = jax.tree.map(lambda u: jnp.where(finite & jnp.isfinite(u), u, 0), mixed)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return self.split(delta, mixed), new

    def check_whole(self, curvature: Curvature, grads: PyTree) -> None:
        """Checks that no layer's gradient is absent, as the quadratic model needs."""
        paths = {text(path) for path in leaves_by_path(grads)}
        missing = {text(path) for tag in curvature.tags for path in tag.leaves} - paths
        if missing and any(map(curvature.covers, paths)):
            raise ValueError(
                "The quadratic model needs the gradients of all layers; absent: "
                f"{', '.join(sorted(missing))}. To train some parameters only, pass "
                "cgfac(where=..., fallback=...), or a learning_rate."
            )

    def check(self, curvature: Curvature, grads: PyTree) -> None:
        """Checks that every leaf has a curvature, a fallback, or was left out."""
        paths = {text(path) for path in leaves_by_path(grads)}
        left_out = {text(p) for p, why in curvature.spec.uncovered if why == LEFT_OUT}
        wrong = [
            path
            for path in sorted(paths - left_out)
            if self.keeps(path) and not curvature.covers(path)
        ]
        if wrong:
            raise ValueError(
                f"No curvature and no fallback for: {', '.join(wrong)}. Pass "
                "cgfac(fallback=optax.adam(1e-3), where=curvature.covers)."
            )
