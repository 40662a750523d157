"""Train on several processes, each with a part of every batch, as one.

    python examples/data_parallel.py                  # two processes on this machine
    python examples/data_parallel.py --processes 4
    python examples/data_parallel.py --processes 1    # the same training, by one

The processes find each other through `jax.distributed` on the loopback address, as they
would on the hosts of a cluster. CG-FAC needs no change: the batch is an array
that all devices share, `jax.jit` distributes the work, and `train_step` is that of one
device.
"""

import argparse
import json
import pathlib
import socket
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optax_cgfac


class Classifier(nn.Module):
    """Two hidden layers; the classes are those of a random network of that kind."""

    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)


model = Classifier()


def loss_fn(params, batch):
    """The mean cross-entropy."""
    logits = model.apply(params, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def make_data(num_examples):
    """Returns inputs, and the classes that another such network gives them."""
    x = jax.random.normal(jax.random.key(0), (num_examples, 32))
    teacher = model.init(jax.random.key(1), x[:1])
    logits = 3 * model.apply(teacher, x)
    return {"x": np.asarray(x), "y": np.asarray(jnp.argmax(logits, -1))}


def train(steps, batch_size, rank="auto"):
    """Trains on all the devices of all processes.

    Args:
      steps: How many.
      batch_size: Examples of a batch, on all devices together.
      rank: Of the solves, as in `optax_cgfac.fisher_estimator`.

    Returns:
      The loss of every step, and the parameters at the end as one list of numbers.
    """
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    data = make_data(8 * batch_size)

    def batch_of(step):
        """A batch of which this process only touches its own part."""
        own = batch_size // jax.process_count()
        first = (step * batch_size) % len(data["x"]) + jax.process_index() * own
        return {
            name: jax.make_array_from_process_local_data(split, x[first : first + own])
            for name, x in data.items()
        }

    params = model.init(jax.random.key(2), data["x"][:1])
    estimator = optax_cgfac.fisher_estimator(
        model.apply, "softmax_cross_entropy", rank=rank
    )
    tx = optax_cgfac.cgfac()
    curvature = estimator.init(params, data["x"][:batch_size])
    # Where its examples lie is where a step leaves them: nothing is compiled twice.
    specs = curvature.partition_specs("data")
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = (
        *jax.device_put((params, tx.init(params)), whole),
        jax.device_put(curvature, places),
    )

    @jax.jit
    def train_step(state, batch, rng):
        params, opt_state, curvature = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        curvature = estimator.update(curvature, params, batch["x"], rng=rng)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            curvature=curvature,
            value=loss,
            value_fn=lambda p: loss_fn(p, batch),
        )
        params = optax.apply_updates(params, updates)
        return (params, opt_state, curvature), loss

    losses = []
    is_first = jax.process_index() == 0
    for step in tqdm(range(steps), disable=not is_first, unit="step"):
        rng = jax.random.fold_in(jax.random.key(3), step)
        state, loss = train_step(state, batch_of(step), rng)
        losses.append(float(loss))
    numbers, _ = jax.flatten_util.ravel_pytree(jax.device_get(state[0]))
    return losses, numbers.tolist()


def launch(processes, arguments):
    """Starts this script once for every process; if one fails, ends the others.

    Args:
      processes: How many.
      arguments: Of the command line, to be handed on.

    Returns:
      The exit status of the first one that failed, as shells count it, or 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(pathlib.Path(__file__).resolve())
    children = [
        subprocess.Popen(
            [sys.executable, script, *arguments, "--port", str(port), "--index", str(i)]
        )
        for i in range(processes)
    ]
    try:
        # The others of one that died would wait for it for minutes.
        while True:
            found = [child.poll() for child in children]
            failed = [status for status in found if status]
            if failed:
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if None not in found:
                return 0
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()


def main(argv=None):
    """Runs the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--steps", type=int, default=60, help="of training (60)")
    parser.add_argument("--batch-size", type=int, default=256, help="of all (256)")
    parser.add_argument(
        "--all-rows",
        action="store_true",
        help="solve with all rows: eigenpairs amplify how sums are rounded, and so the "
        "fourth digit of the loss shows the number of processes",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON of losses and parameters"
    )
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.processes < 1 or args.batch_size % args.processes:
        parser.error("--batch-size must be a multiple of --processes")
    if args.processes > 1 and args.port is None:
        return launch(args.processes, arguments)
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.index)
    rank = None if args.all_rows else "auto"
    losses, params = train(args.steps, args.batch_size, rank)
    if args.index == 0 and args.out:
        args.out.write_text(json.dumps({"losses": losses, "params": params}))
    if args.index == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(f"{'step':>6}{'loss':>12}")
        for step in sorted({0, args.steps // 4, args.steps // 2, args.steps - 1}):
            print(f"{step:6d}{losses[step]:12.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
