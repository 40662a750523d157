"""Who trains: each optimizer as a compiled step ``(state, batch, rng)``.

``build("adam", workload, batch_size=256, learning_rate=1e-3)`` compiles one. Every
contestant can start again from other parameters, so that seeds share what was
compiled. The first item of a state is the parameters.
"""

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from curves import tree_bytes
from workloads import Batch, Workload

import optax_cgfac

State = tuple[Any, Any]
StepFn = Callable[[State, Batch, jax.Array], tuple[State, jax.Array]]

# Where nothing was tuned: the usual values.
UNTUNED = {
    "cgfac": {},
    "gradient": {"learning_rate": 1e-3},
    "adam": {"learning_rate": 1e-3},
    "sgd": {"learning_rate": 1e-2},
    "muon": {"learning_rate": 3e-3},
    "shampoo": {"learning_rate": 1e-3},
    "scale_by_kfac": {"learning_rate": 1e-3, "damping": 1e-1},
    "kfac_jax": {"initial_damping": 10.0},
}

LABELS = {
    "cgfac": "cgfac()",
    "gradient": "plain gradient",
    "adam": "Adam",
    "sgd": "SGD, momentum 0.9",
    "muon": "Muon",
    "shampoo": "Shampoo",
    "scale_by_kfac": "scale_by_kfac",
    "kfac_jax": "kfac-jax",
}


class Contestant(NamedTuple):
    """An optimizer ready to train.

    Attributes:
      method: A key of `UNTUNED`.
      batch_size: What it is given in every step.
      options: Its settings, as they were passed to `build`.
      start: Parameters to the state that training starts from, a copy.
      step: ``(state, batch, rng) -> (state, loss)``; it gives the state away.
      compile_seconds: Tracing and compilation of the step.
      state_bytes: All that is kept from step to step beside the parameters.
      min_steps: So many steps are taken even if all thresholds are reached before.
    """

    method: str
    batch_size: int
    options: dict[str, float]
    start: Callable[[Any], State]
    step: StepFn
    compile_seconds: float
    state_bytes: int
    min_steps: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return {"method": self.method, "batch_size": self.batch_size, **self.options}


def missing(method: str) -> str | None:
    """Returns why a method cannot run here, or None."""
    package = {"kfac_jax": "kfac-jax", "shampoo": "precondition-opt"}.get(method)
    module = {"kfac_jax": "kfac_jax", "shampoo": "precondition"}.get(method)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


def build(
    method: str, workload: Workload, *, batch_size: int | None = None, **options: float
) -> Contestant:
    """Compiles a contestant.

    Args:
      method: A key of `UNTUNED`.
      workload: What it trains on.
      batch_size: Of its steps; the workload's own by default.
      **options: Of the method; those of `UNTUNED` where none is given.

    Returns:
      The contestant.

    Raises:
      ValueError: If the method is unknown.
    """
    if method not in UNTUNED:
        raise ValueError(f"Unknown method {method!r}. Methods: {', '.join(UNTUNED)}.")
    size = workload.batch_size if batch_size is None else batch_size
    options = {**UNTUNED[method], **options}
    if method == "kfac_jax":
        rival = importlib.import_module("kfac_rival")
        start, step, seconds, num_bytes = rival.prepare(workload, size, **options)
        return Contestant(method, size, options, start, step, seconds, num_bytes)
    start, step = (
        with_curvature(method, workload, size, **options)
        if method in ("cgfac", "scale_by_kfac")
        else first_order(method, workload, **options)
    )
    batch = workload.batch(size)
    state = start(workload.init(0))
    num_bytes = tree_bytes(state[1])
    started = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, batch, jax.random.key(0)).compile()
    seconds = time.perf_counter() - started
    # What a program does in its first run alone is not on anybody's clock.
    jax.block_until_ready(compiled(state, batch, jax.random.key(0)))
    return Contestant(method, size, options, start, compiled, seconds, num_bytes)


def with_curvature(
    method: str, workload: Workload, batch_size: int, **options: float
) -> tuple[Callable[[Any], State], StepFn]:
    """This library: `cgfac` with every default, or the K-FAC it comes with."""
    estimator = optax_cgfac.fisher_estimator(workload.model_fn, workload.loss)
    if method == "cgfac":
        tx = optax_cgfac.cgfac(**options)
    else:
        tx = optax.chain(
            optax_cgfac.scale_by_kfac(options["damping"]),
            optax.scale_by_learning_rate(options["learning_rate"]),
        )
    inputs = workload.batch(batch_size)["x"]

    def start(params: Any) -> State:
        params = jax.tree.map(jnp.copy, params)
        return params, (tx.init(params), estimator.init(params, inputs))

    def step(state: State, batch: Batch, rng: jax.Array) -> tuple[State, jax.Array]:
        params, (opt_state, curvature) = state
        loss, grads = jax.value_and_grad(workload.loss_fn)(params, batch)
        curvature = estimator.update(curvature, params, batch["x"], rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda p: workload.loss_fn(p, batch),
        )
        return (optax.apply_updates(params, updates), (opt_state, curvature)), loss

    return start, step


def first_order(
    method: str, workload: Workload, *, learning_rate: float
) -> tuple[Callable[[Any], State], StepFn]:
    """Optimizers that take gradients alone."""
    makers = {
        "gradient": optax.sgd,
        "adam": optax.adam,
        "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
        # For matrices; everything else goes to the Adam it comes with.
        "muon": optax.contrib.muon,
        "shampoo": shampoo,
    }
    tx = makers[method](learning_rate)

    def start(params: Any) -> State:
        params = jax.tree.map(jnp.copy, params)
        return params, tx.init(params)

    def step(state: State, batch: Batch, rng: jax.Array) -> tuple[State, jax.Array]:
        del rng
        params, opt_state = state
        loss, grads = jax.value_and_grad(workload.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return start, step


def shampoo(learning_rate: float) -> optax.GradientTransformation:
    """Distributed Shampoo of precondition-opt 0.3.0, the one that runs.

    Of what pip finds, tried on jax 0.9.1: ``optax-shampoo`` 0.0.6 stops in its own
    ``while_loop`` (a carry changes its dtype) even with the aliases below, and pip
    found no ``soap-jax``, ``distributed-shampoo``, ``scalable-shampoo`` or
    ``precondition``. ``precondition-opt`` 0.3.0 runs once the aliases are back that
    JAX removed in 2024. It computes roots in float32 where 64 bits are off.

    Args:
      learning_rate: Of the grafted steps.

    Returns:
      The transformation.
    """
    aliases = {
        "tree_map": jax.tree.map,
        "tree_flatten": jax.tree.flatten,
        "tree_unflatten": jax.tree.unflatten,
    }
    module = importlib.import_module("precondition.distributed_shampoo")

    class WithAliases:
        def __getattr__(self, name):
            return aliases.get(name) or getattr(jax, name)

    module.jax = WithAliases()
    warnings.filterwarnings("ignore", "Explicitly requested dtype float64")
    return module.distributed_shampoo(
        learning_rate,
        block_size=128,  # its roots then cost about as much as the gradient
        graft_type=module.GraftingType.RMSPROP_NORMALIZED,
        preconditioning_compute_steps=10,
        generate_training_metrics=False,
    )
