"""Flax's `TrainState` with a curvature, and keyword arguments for the optimizer."""

import functools
from typing import Any, Self

import optax
from flax.training import train_state

from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.optimize.scale_by import gradient_transformation
from optax_cgfac.utils.types import PyTree


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` for optimizers that need a curvature.

    Attributes:
      curvature: That of the last step, from ``estimator.init`` and then
        ``estimator.update``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_cgfac
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(1), jax.random.normal(jax.random.key(0), (32, 3))
      >>> params = model.init(jax.random.key(1), x)
      >>> estimator = optax_cgfac.fisher_estimator(model.apply, "squared_error")
      >>> state = optax_cgfac.TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=params,
      ...     tx=optax_cgfac.cgfac(),
      ...     curvature=estimator.init(params, x),
      ... )
      >>> @jax.jit
      ... def train_step(state, x, rng):
      ...     def loss_fn(params):
      ...         return jnp.mean(jnp.sum((state.apply_fn(params, x) - 1) ** 2, -1))
      ...
      ...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
      ...     curvature = estimator.update(state.curvature, state.params, x, rng=rng)
      ...     return state.apply_gradients(
      ...         grads=grads, curvature=curvature, value=loss, value_fn=loss_fn
      ...     )
      >>> state = train_step(state, x, jax.random.key(2))
      >>> int(state.step), int(state.curvature.num_updates)
      (1, 1)
    """

    curvature: Curvature | None = None

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        curvature: Curvature | None = None,
        value: Any = None,
        value_fn: Any = None,
        extra_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Takes a step, and keeps the curvature it was taken with.

        Args:
          grads: The gradients.
          curvature: The curvature of this step; None for the state's own.
          value: The loss, for `cgfac` without a learning rate.
          value_fn: The loss of the same batch as a function of the parameters,
            likewise.
          extra_args: Further keyword arguments of ``tx.update``.
          **kwargs: Fields of the state to replace, as in Flax.

        Returns:
          The new state.
        """
        curvature = self.curvature if curvature is None else curvature
        given = {"curvature": curvature, "value": value, "value_fn": value_fn}
        given = {name: x for name, x in given.items() if x is not None}
        update = optax.with_extra_args_support(self.tx).update
        bound = gradient_transformation(
            self.tx.init, functools.partial(update, **given, **(extra_args or {}))
        )
        # Flax's own step, so that all it does (FP8 parameters, say) stays.
        state = super(TrainState, self.replace(tx=bound)).apply_gradients(
            grads=grads, **kwargs
        )
        return state.replace(tx=self.tx, curvature=curvature)
