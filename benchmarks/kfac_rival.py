"""kfac-jax's own `Optimizer` as a contestant, set up as in its autoencoder example.

Learning rate, momentum and damping are adaptive, and the Fisher matrix comes from
sampled targets. The initial damping, 150 in the example, determines the first steps
and is tuned here.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
from workloads import LOSSES, Batch, Workload

# The damping and the inverses are both updated at this period. After one period and
# one step, every variant of the step is compiled.
PERIOD = 5
TRIAL_STEPS = PERIOD + 1


def registered_loss(workload: Workload) -> Callable[[Any, Batch], jax.Array]:
    """Returns the workload's loss, registered with kfac-jax.

    kfac-jax's registered losses are ``weight`` times a sum over everything but the
    batch, divided by the batch size, and its squared error has no factor 1/2. With a
    weight of one over the positions of an example, its Fisher matrix equals that of
    `cgfac`.
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
) -> tuple[Callable[..., Any], Callable[..., Any], float, Any]:
    """Returns the start, the compiled step, its compile seconds and a state."""
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

    def start(params: Any) -> Any:
        params = jax.tree.map(jnp.copy, params)
        return params, (optimizer.init(params, key, batch), 0)

    def step(state: Any, batch: Batch, rng: jax.Array) -> tuple[Any, jax.Array]:
        params, (opt_state, count) = state
        if count == 0:
            # The burn-in makes five curvature estimates before the first step. It
            # donates its batches, so it gets copies.
            source = (jax.tree.map(jnp.copy, batch) for _ in itertools.count())
            data = {"data_iterator": source}
        else:
            data = {"batch": batch}
        params, opt_state, stats = optimizer.step(
            params, opt_state, rng, global_step_int=count, **data
        )
        return (params, (opt_state, count + 1)), stats["loss"]

    with warnings.catch_warnings():
        # kfac-jax donates integers and batches, which CPUs cannot use.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        first, opt_state = time_steps(start(workload.init(0)), step, batch, key)
        second, _ = time_steps(start(workload.init(0)), step, batch, key)
    return start, step, max(first - second, 0.0), opt_state


def time_steps(state: Any, step: Any, batch: Batch, key: Any) -> tuple[float, Any]:
    """Returns the seconds of `TRIAL_STEPS` steps and the optimizer state."""
    started = time.perf_counter()
    for i in range(TRIAL_STEPS):
        state, loss = step(state, batch, jax.random.fold_in(key, i))
    jax.block_until_ready((state[0], state[1][0], loss))
    return time.perf_counter() - started, state[1][0]
