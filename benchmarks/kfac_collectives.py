"""What eight devices tell each other in a step of kfac-jax: the collectives, in bytes.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8 OPENBLAS_NUM_THREADS=1
    python benchmarks/kfac_collectives.py --json benchmarks/results/collectives.json

For the autoencoder and batch of `collectives.py`, whose JSON it completes. Takes one
step of kfac-jax's own `Optimizer(multi_device=True)`; the compiled program is what XLA
writes down of it. Needs the environment of the benchmarks, with kfac-jax.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import version

from collectives import Autoencoder, collectives


def step(batch_size: int, features: int) -> None:
    """Takes one step of kfac-jax on all devices."""
    import jax
    import jax.numpy as jnp
    import kfac_jax

    model = Autoencoder()
    devices = jax.device_count()

    def loss_fn(params, batch):
        outputs = model.apply(params, batch)
        kfac_jax.register_squared_error_loss(outputs, batch)
        return jnp.mean(jnp.sum((outputs - batch) ** 2, -1))

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss_fn),
        l2_reg=0.0,
        estimation_mode="fisher_gradients",
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
        inverse_update_period=5,
        multi_device=True,
    )
    shape = (devices, batch_size // devices, features)
    batch = jax.random.normal(jax.random.key(0), shape)
    params = jax.jit(model.init)(jax.random.key(0), batch[0])
    params = kfac_jax.utils.replicate_all_local_devices(params)
    rng = kfac_jax.utils.make_different_rng_key_on_all_devices(jax.random.PRNGKey(1))
    state = optimizer.init(params, rng, batch)
    optimizer.step(params, state, rng, batch=jnp.copy(batch), global_step_int=0)


def measure(batch_size: int, features: int) -> list[tuple[str, int]]:
    """Returns kind and bytes of every collective in the program of the step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_hlo_as_text"
        subprocess.run(
            [sys.executable, __file__, "--step", f"--batch={batch_size}"],
            env=os.environ | {"XLA_FLAGS": f"{flags} --xla_dump_to={folder}"},
            check=True,
        )
        (program,) = pathlib.Path(folder).glob("*step*after_optimizations.txt")
        return collectives(program.read_text())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1024, help="examples (1024)")
    parser.add_argument("--json", type=pathlib.Path, help="the file to complete")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.batch, 784)
        return
    found = measure(args.batch, 784)
    for kind, size in found:
        print(f"{kind:12} {size / 1024:12,.1f} KiB")
    if args.json:
        result = json.loads(args.json.read_text())
        if result["batch"] != args.batch:
            parser.error(f"the file is about batches of {result['batch']}")
        result["programs"]["kfac-jax, pmap"] = found
        versions = {name: version(name) for name in ("jax", "kfac-jax")}
        args.json.write_text(json.dumps({**result, "kfac-jax": versions}, indent=1))


if __name__ == "__main__":
    main()
