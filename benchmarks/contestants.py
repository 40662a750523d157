"""The optimizers, each compiled to a step ``(state, batch, rng) -> (state, loss)``.

``build("adam", workload, batch_size=256, learning_rate=1e-3)`` compiles one. The first
item of a state is the parameters. A contestant can start from several sets of
parameters, so all seeds share one compiled step.
"""

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from workloads import Batch, Workload

import optax_cgfac

State = tuple[Any, Any]
StartFn = Callable[[Any], State]
StepFn = Callable[[State, Batch, jax.Array], tuple[State, jax.Array]]


class Method(NamedTuple):
    label: str
    options: dict[str, float]  # usual settings, where none were tuned


METHODS = {
    "cgfac": Method("cgfac()", {}),
    "gradient": Method("plain gradient", {"learning_rate": 1e-3}),
    "adam": Method("Adam", {"learning_rate": 1e-3}),
    "sgd": Method("SGD, momentum 0.9", {"learning_rate": 1e-2}),
    "muon": Method("Muon", {"learning_rate": 3e-3}),
    "shampoo": Method("Shampoo", {"learning_rate": 1e-3}),
    "scale_by_kfac": Method("scale_by_kfac", {"learning_rate": 1e-3, "damping": 0.1}),
    "kfac_jax": Method("kfac-jax", {"initial_damping": 10.0}),
}


class Contestant(NamedTuple):
    """An optimizer with a compiled step."""

    method: str  # a key of `METHODS`
    batch_size: int
    options: dict[str, float]
    start: StartFn  # copies the parameters
    step: StepFn  # donates the state
    compile_seconds: float  # to trace and compile the step
    state_bytes: int  # without the parameters
    min_steps: int = 0  # taken even if the last threshold is reached before

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": self.method, "batch_size": self.batch_size, **self.options}


def reason(error: Exception) -> str:
    """Returns why a method cannot run here."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}"[:300]


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def build(
    method: str, workload: Workload, *, batch_size: int | None = None, **options: float
) -> Contestant:
    """Compiles a contestant; ``options`` override those of `METHODS`."""
    size = workload.batch_size if batch_size is None else batch_size
    options = {**METHODS[method].options, **options}
    if method == "kfac_jax":
        rival = importlib.import_module("kfac_rival")
        start, step, seconds, state = rival.prepare(workload, size, **options)
        num_bytes = tree_bytes(state)
        return Contestant(method, size, options, start, step, seconds, num_bytes)
    batch = workload.batch(size)
    prepare = second_order if method in ("cgfac", "scale_by_kfac") else first_order
    init, update = prepare(method, workload, batch, **options)

    def start(params: Any) -> State:
        params = jax.tree.map(jnp.copy, params)
        return params, init(params)

    def step(state: State, batch: Batch, rng: jax.Array) -> tuple[State, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(workload.loss_fn)(params, batch)
        updates, opt_state = update(grads, opt_state, params, batch, loss, rng)
        return (optax.apply_updates(params, updates), opt_state), loss

    state = start(workload.init(0))
    num_bytes = tree_bytes(state[1])
    started = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, batch, jax.random.key(0)).compile()
    seconds = time.perf_counter() - started
    # The first run does one-time work that no clock should count.
    jax.block_until_ready(compiled(state, batch, jax.random.key(0)))
    return Contestant(method, size, options, start, compiled, seconds, num_bytes)


def second_order(
    method: str, workload: Workload, batch: Batch, **options: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns init and update of `cgfac` at its defaults, or of `scale_by_kfac`."""
    estimator = optax_cgfac.fisher_estimator(workload.model_fn, workload.loss)
    if method == "cgfac":
        tx = optax_cgfac.cgfac(**options)
    else:
        tx = optax.chain(
            optax_cgfac.scale_by_kfac(options["damping"]),
            optax.scale_by_learning_rate(options["learning_rate"]),
        )

    def update(grads, state, params, batch, loss, rng):
        opt_state, curvature = state
        curvature = estimator.update(curvature, params, batch["x"], rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda p: workload.loss_fn(p, batch),
        )
        return updates, (opt_state, curvature)

    return lambda params: (tx.init(params), estimator.init(params, batch["x"])), update


def first_order(
    method: str, workload: Workload, batch: Batch, *, learning_rate: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns init and update of an optimizer that uses only gradients."""
    del workload, batch
    makers = {
        "gradient": optax.sgd,
        "adam": optax.adam,
        "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
        "muon": optax.contrib.muon,  # uses Adam for all but matrices
        "shampoo": shampoo,
    }
    tx = makers[method](learning_rate)
    return tx.init, lambda grads, state, params, *_: tx.update(grads, state, params)


def shampoo(learning_rate: float) -> optax.GradientTransformation:
    """Distributed Shampoo from precondition-opt 0.3.0.

    The package needs aliases that JAX removed in 2024; they are restored here. It
    computes matrix roots in float32 unless 64-bit types are enabled.
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
        block_size=128,  # the roots then cost about as much as the gradient
        graft_type=module.GraftingType.RMSPROP_NORMALIZED,
        preconditioning_compute_steps=10,
        generate_training_metrics=False,
    )
