"""kfac-jax as a contestant: its own `Optimizer`, set as in its autoencoder example.

Adaptive learning rate, momentum and damping; Fisher from sampled targets. Its initial
damping, 150 in the example, decides how the first steps go and is tuned here.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
from curves import tree_bytes
from workloads import LOSSES, Batch, Workload

# Two periods of the damping's adaptation and of the inverses: every variant of the
# step that its static arguments ask for is compiled after so many steps.
PERIOD = 5
TRIAL_STEPS = PERIOD + 1


def registered_loss(workload: Workload) -> Callable[[Any, Batch], jax.Array]:
    """Returns the workload's loss, which also tells kfac-jax what its Fisher is.

    The registered losses are ``weight`` times a sum over everything but the batch,
    divided by the batch size; the squared error has no factor 1/2. So the weight is
    one over the positions of an example, and the Fisher is the one `cgfac` has.

    Args:
      workload: Whose loss it is.

    Returns:
      ``loss_fn(params, batch)``.
    """
    register = {
        "softmax_cross_entropy": kfac_jax.register_softmax_cross_entropy_loss,
        "sigmoid_binary_cross_entropy": kfac_jax.register_sigmoid_cross_entropy_loss,
        "squared_error": kfac_jax.register_squared_error_loss,
    }[workload.loss]

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        outputs = workload.model_fn(params, batch["x"])
        losses = LOSSES[workload.loss](outputs, batch["y"])
        register(outputs, batch["y"], weight=len(outputs) / losses.size)
        return losses.mean()

    return loss_fn


def prepare(
    workload: Workload, batch_size: int, *, initial_damping: float
) -> tuple[Callable[..., Any], Callable[..., Any], float, int]:
    """Compiles kfac-jax's step.

    Args:
      workload: What it trains on.
      batch_size: Of its steps.
      initial_damping: From which Levenberg-Marquardt adapts it.

    Returns:
      The start, the step, the seconds to compile and the bytes of the state.
    """
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(registered_loss(workload)),
        l2_reg=0.0,
        estimation_mode="fisher_gradients",
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=initial_damping,
        min_damping=1e-5,
        max_damping=1000.0,
        damping_adaptation_decay=0.95,
        damping_adaptation_interval=PERIOD,
        inverse_update_period=PERIOD,
        num_burnin_steps=5,
        curvature_ema=0.95,
    )
    batch = workload.batch(batch_size)
    key = jax.random.key(0)

    def start(params: Any, damping: float = initial_damping) -> Any:
        params = jax.tree.map(jnp.copy, params)
        state = optimizer.init(params, key, batch)
        state.damping = jnp.full_like(state.damping, damping)
        return params, (state, 0)

    def step(state: Any, batch: Batch, rng: jax.Array) -> tuple[Any, jax.Array]:
        params, (opt_state, count) = state
        if count == 0:
            # The burn-in, five estimates of the curvature before the first step. It
            # gives its batches away: copies.
            source = (jax.tree.map(jnp.copy, batch) for _ in itertools.count())
            data = {"data_iterator": source}
        else:
            data = {"batch": batch}
        params, opt_state, stats = optimizer.step(
            params, opt_state, rng, global_step_int=count, **data
        )
        return (params, (opt_state, count + 1)), stats["loss"]

    def trial() -> tuple[float, Any]:
        state = start(workload.init(0))
        started = time.perf_counter()
        for i in range(TRIAL_STEPS):
            state, loss = step(state, batch, jax.random.fold_in(key, i))
        jax.block_until_ready((state[0], state[1][0], loss))
        return time.perf_counter() - started, state[1][0]

    with warnings.catch_warnings():
        # Its donations of integers and of batches have no use on a CPU.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        first, opt_state = trial()
        second, _ = trial()
    return start, step, max(first - second, 0.0), tree_bytes(opt_state)
