"""Deep autoencoder on CURVES: `cgfac()` with its defaults against Adam.

The problem of Hinton and Salakhutdinov (2006) on which second-order optimizers have
been compared since Martens (2010): a 784-1000-500-250-30 autoencoder, mirrored, with
tanh units and a linear code, trained on grey images of curves with the cross-entropy
of each pixel summed over the image. Grey targets have an entropy of their own, so the
loss cannot fall below a floor; the program computes and prints it.

Both optimizers start from the same parameters and take their steps in turn on the
same batches, so that a busy machine slows both. Only the steps are on the clock:
compilation and the evaluation on all the images are not.

    python benchmarks/curves.py --json curves.json
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import entr
from tqdm import tqdm

import optax_cgfac

SIDE = 28  # pixels
MARKS = (10, 25, 50, 100, 200, 500, 1000)  # the steps at which the loss is reported
WARM_UP = 3  # steps that do not count for the step time
ADAM_LEARNING_RATE = 1e-3

# The two constants of the generator. Published losses on CURVES have a floor of about
# 47.8 nats per image; this pen gives that, and with this margin Adam (1e-3, batch 256)
# is at 61 after 1,000 steps, where it was on the data this library began with.
PEN_SIGMA = 0.808  # pixels
MARGIN = 1.5  # pixels between the three points and the border


def make_curves(num_images: int, seed: int = 0) -> np.ndarray:
    """Draws random quadratic Bézier curves with a Gaussian pen.

    A curve goes through three points, uniform in the image. Its ink is the integral
    of the pen along the curve, normalised to one on a long straight stroke and cut off
    at one where the curve meets itself.

    Args:
      num_images: The number of images.
      seed: The seed of the points.

    Returns:
      An array of shape (num_images, 784), float32, values in [0, 1].
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform(MARGIN, SIDE - 1 - MARGIN, (num_images, 3, 1, 2))
    start, middle, end = np.moveaxis(points.astype(np.float32), 1, 0)
    control = 2 * middle - (start + end) / 2  # so that t = 1/2 is the middle point

    num_samples = 64
    t = ((np.arange(num_samples) + 0.5) / num_samples).astype(np.float32)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    velocity = 2 * (1 - t) * (control - start) + 2 * t * (end - control)
    length = np.linalg.norm(velocity, axis=-1, keepdims=True) / num_samples

    # The pen separates into x and y: an image is one small matrix product.
    pixels = np.arange(SIDE, dtype=np.float32)
    pen = np.exp(-0.5 * ((curve[..., None] - pixels) / PEN_SIGMA) ** 2)
    across, down = pen[:, :, 0], pen[:, :, 1]  # (images, samples, pixels)
    down = down * length / (PEN_SIGMA * np.sqrt(2 * np.pi, dtype=np.float32))
    images = np.matmul(down.transpose(0, 2, 1), across)
    return np.minimum(images, 1).reshape(num_images, SIDE * SIDE)


def entropy_floor(images: np.ndarray) -> float:
    """The entropy of the grey values: the least cross-entropy per image, in nats."""
    grey = images.astype(np.float64)
    return float((entr(grey) + entr(1 - grey)).sum(axis=-1).mean())


def batches(images: np.ndarray, size: int, seed: int) -> Iterator[jax.Array]:
    """Batches without replacement, shuffled anew in every epoch, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for first in range(0, len(images) - size + 1, size):
            yield jnp.asarray(images[order[first : first + size]])


class Autoencoder(nn.Module):
    """A mirrored autoencoder: tanh, a linear code, logits as its output."""

    widths: tuple[int, ...] = (1000, 500, 250, 30)

    @nn.compact
    def __call__(self, x):
        num_pixels = x.shape[-1]
        *hidden, code = self.widths
        for width in hidden:
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(code)(x)
        for width in reversed(hidden):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(num_pixels)(x)


class Run(NamedTuple):
    """An optimizer ready to train: its compiled step and where it starts."""

    step: Any  # (state, batch, rng) -> (state, loss)
    state: Any  # (params, optimizer's own state)
    compile_seconds: float


def cgfac_run(model: nn.Module, loss_fn, params, batch) -> Run:
    """`cgfac()` with its defaults."""
    estimator = optax_cgfac.fisher_estimator(
        model.apply, "sigmoid_binary_cross_entropy"
    )
    tx = optax_cgfac.cgfac()
    curvature = estimator.init(params, batch)
    print(curvature.report(), end="\n\n")

    def step(state, batch, rng):
        params, (opt_state, curvature) = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        curvature = estimator.update(curvature, params, batch, rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda p: loss_fn(p, batch),
        )
        return (optax.apply_updates(params, updates), (opt_state, curvature)), loss

    return compile_run(step, (params, (tx.init(params), curvature)), batch)


def adam_run(loss_fn, params, batch) -> Run:
    """Adam with its usual learning rate."""
    tx = optax.adam(ADAM_LEARNING_RATE)

    def step(state, batch, rng):
        del rng
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return compile_run(step, (params, tx.init(params)), batch)


def compile_run(step, state, batch) -> Run:
    """Compiles the step, on a copy of the state because the step gives it away."""
    state = jax.tree.map(jnp.copy, state)
    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, batch, jax.random.key(0)).compile()
    return Run(compiled, state, time.perf_counter() - start)


def tree_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "optax_cgfac")
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    device = jax.devices()[0]
    variables = ("XLA_FLAGS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": platform.platform(terse=True),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": f"{device.platform} ({device.device_kind})",
        **{name: os.environ[name] for name in variables if name in os.environ},
        "load before": round(os.getloadavg()[0], 2),  # the minute before the run
    }


def others_seconds() -> float:
    """Processor seconds that all but this process and its children have used.

    Returns:
      The seconds; NaN if not on Linux.
    """
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    fields = stat.read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _wait, *interrupts = map(int, fields)
    ticks = user + nice + system + sum(interrupts)
    children = os.times()
    own = time.process_time() + children.children_user + children.children_system
    return ticks / os.sysconf("SC_CLK_TCK") - own


def benchmark(
    *,
    steps: int = 100,
    pairs: int | None = None,
    batch_size: int = 1000,
    num_images: int = 10_000,
    seed: int = 0,
    widths: tuple[int, ...] = (1000, 500, 250, 30),
) -> dict[str, Any]:
    """Trains both optimizers in turn and returns everything that was measured.

    Args:
      steps: Steps of cgfac.
      pairs: How many steps after the warm-up Adam takes too; all of them by default.
      batch_size: The batch size of both.
      num_images: The size of the training set.
      seed: The seed of the images, the parameters, the batches and the sampling.
      widths: The encoder's widths, the code last.

    Returns:
      A dict that `json` can write.

    Raises:
      ValueError: If there are too few images for a batch, or no step to measure.
    """
    if not 0 < batch_size <= num_images:
        raise ValueError(
            f"batch size {batch_size}: expected 1 to the number of images, {num_images}"
        )
    if steps <= WARM_UP or (pairs is not None and pairs < 1):
        raise ValueError(
            f"{steps} steps, {pairs} pairs: expected at least one pair after the "
            f"{WARM_UP} warm-up steps"
        )
    facts = environment()
    others_before = others_seconds()
    started = time.perf_counter()
    images = make_curves(num_images, seed)
    data_seconds = time.perf_counter() - started

    model = Autoencoder(widths)

    def loss_fn(params, batch):
        logits = model.apply(params, batch)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch)
        return losses.sum(axis=-1).mean()

    stream = batches(images, batch_size, seed)
    batch = jnp.asarray(images[:batch_size])
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, batch[:1])
    runs = {
        "cgfac": cgfac_run(model, loss_fn, params, batch),
        "adam": adam_run(loss_fn, params, batch),
    }
    evaluate = jax.jit(loss_fn)
    all_images = jnp.asarray(images)
    initial_loss = float(evaluate(params, all_images))

    states = {name: run.state for name, run in runs.items()}
    times = {name: [] for name in runs}
    losses = {name: {} for name in runs}
    num_paired = steps if pairs is None else min(steps, WARM_UP + pairs)
    marks = {mark for mark in MARKS if mark < steps} | {steps}
    with tqdm(total=steps, desc="CURVES", unit="step") as bar:
        for i in range(1, steps + 1):
            batch = next(stream)
            rng = jax.random.fold_in(step_key, i)
            # Who goes first alternates, so that neither always has the warmer caches.
            names = ("cgfac", "adam") if i % 2 else ("adam", "cgfac")
            for name in names if i <= num_paired else ("cgfac",):
                jax.block_until_ready((batch, rng))
                start = time.perf_counter()
                states[name], loss = runs[name].step(states[name], batch, rng)
                jax.block_until_ready((states[name], loss))
                times[name].append(time.perf_counter() - start)
                if name == "cgfac":
                    bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)
                if i in marks:
                    losses[name][i] = float(evaluate(states[name][0], all_images))
            bar.update()

    opt_state, _ = states["cgfac"][1]
    scalars = {
        key: float(value)
        for key, value in optax_cgfac.diagnostics(opt_state).items()
        if hasattr(value, "ndim") and value.ndim == 0
    }
    others = (others_seconds() - others_before) / (time.perf_counter() - started)
    facts["others used"] = f"{max(others, 0):.2f} cores meanwhile"
    slow, fast = (
        np.array(times[name][WARM_UP:num_paired]) for name in ("cgfac", "adam")
    )
    return {
        "benchmark": "CURVES autoencoder",
        "environment": facts,
        "settings": {
            "steps": steps,
            "batch_size": batch_size,
            "num_images": num_images,
            "seed": seed,
            "widths": list(widths),
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "adam_learning_rate": ADAM_LEARNING_RATE,
        },
        "data_seconds": data_seconds,
        "floor": entropy_floor(images),
        "initial_loss": initial_loss,
        "optimizers": {
            name: {
                "loss": losses[name],
                "seconds": {mark: sum(times[name][:mark]) for mark in losses[name]},
                "step_seconds": {
                    "median": float(np.median(times[name][WARM_UP:])),
                    "mean": float(np.mean(times[name][WARM_UP:])),
                },
                "compile_seconds": run.compile_seconds,
                "state_bytes": tree_bytes(states[name][1]),
            }
            for name, run in runs.items()
        },
        "step_time_ratio": {
            "median": float(np.median(slow / fast)),
            "quartiles": np.quantile(slow / fast, (0.25, 0.75)).tolist(),
            "of_totals": float(slow.sum() / fast.sum()),
            "pairs": len(slow),
        },
        "diagnostics": scalars,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    settings, optimizers = result["settings"], result["optimizers"]
    ratio = result["step_time_ratio"]
    names = list(optimizers)
    layers = "-".join(str(width) for width in (SIDE * SIDE, *settings["widths"]))
    lines = [f"{key:13}{value}" for key, value in result["environment"].items()]
    lines += [
        "",
        f"CURVES, {settings['num_images']:,} images, autoencoder {layers} and back "
        f"({settings['num_params']:,} parameters),",
        f"batch {settings['batch_size']}, seed {settings['seed']}, "
        f"Adam's learning rate {settings['adam_learning_rate']}",
        "",
        "cross-entropy per image over all the training images: "
        f"{result['initial_loss']:.1f} at the start, floor {result['floor']:.1f}",
        "",
        "step".rjust(6) + "".join(f"{name:>10}{'seconds':>10}" for name in names),
    ]
    for mark in optimizers["cgfac"]["loss"]:
        line = f"{mark:6}"
        for name in names:
            run = optimizers[name]
            if mark in run["loss"]:
                line += f"{run['loss'][mark]:10.2f}{run['seconds'][mark]:10.2f}"
            else:
                line += f"{'-':>10}{'-':>10}"
        lines.append(line)
    lines += ["", " " * 26 + "".join(f"{name:>10}" for name in names)]
    for label, value in {
        "seconds per step, median": lambda run: f"{run['step_seconds']['median']:.4f}",
        "seconds per step, mean": lambda run: f"{run['step_seconds']['mean']:.4f}",
        "seconds to compile": lambda run: f"{run['compile_seconds']:.1f}",
        "state, MiB": lambda run: f"{run['state_bytes'] / 2**20:.1f}",
    }.items():
        row = "".join(f"{value(optimizers[name]):>10}" for name in names)
        lines.append(f"{label:26}{row}")
    low, high = ratio["quartiles"]
    scalars = [f"{key} {value:.4g}" for key, value in result["diagnostics"].items()]
    lines += [
        "",
        f"step-time ratio cgfac / adam: {ratio['median']:.2f}, the median of "
        f"{ratio['pairs']} interleaved pairs",
        f"(quartiles {low:.2f} and {high:.2f}; ratio of the totals "
        f"{ratio['of_totals']:.2f})",
        f"cgfac at the end: {', '.join(scalars)}",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark from the command line and returns its result."""
    parser = argparse.ArgumentParser(
        description="cgfac() against Adam on the CURVES autoencoder",
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of cgfac (100)")
    parser.add_argument(
        "--pairs",
        type=int,
        help=f"of the steps after the {WARM_UP} warm-up ones, how many Adam takes too "
        "(all)",
    )
    parser.add_argument("--batch", type=int, default=1000, help="of both (1000)")
    parser.add_argument("--images", type=int, default=10_000, help="how many (10000)")
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[1000, 500, 250, 30],
        help="the encoder's widths, the code last (1000 500 250 30)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (0)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="25 steps on 2,000 images, to see that it works: well within a minute",
    )
    args = parser.parse_args(argv)
    try:
        result = benchmark(
            steps=min(args.steps, 25) if args.fast else args.steps,
            pairs=args.pairs,
            batch_size=args.batch,
            num_images=min(args.images, 2000) if args.fast else args.images,
            seed=args.seed,
            widths=tuple(args.widths),
        )
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {args.json}")
    return result


if __name__ == "__main__":
    main()
