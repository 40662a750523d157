"""What eight devices tell each other in a training step: the collectives, in bytes.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8 OPENBLAS_NUM_THREADS=1
    python benchmarks/collectives.py

Lists the collectives of the compiled programs of Adam and `cgfac`, data parallel on
eight CPU devices, under `jax.jit` and inside `jax.shard_map`, and of a K-FAC whose
devices average the Kronecker factors of their own examples, as K-FAC must. Bytes are
those of a result, not counting how often an algorithm sends them on.
"""

import argparse
import collections
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cgfac

PROGRAMS = ("Adam, jit", "cgfac, jit", "cgfac, shard_map", "K-FAC, shard_map")
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SIZES = {
    "f64": 8,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "pred": 1,
    "s8": 1,
}
_LINE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(program: str) -> list[tuple[str, int]]:
    """Returns kind and bytes of every collective in the text of a compiled program.

    Args:
      program: ``lowered.compile().as_text()``.

    Returns:
      A pair for each; several arrays in one are added up.
    """
    found = []
    for line in program.splitlines():
        match = _LINE.search(line)
        if match:
            shapes = _SHAPE.findall(match[1])
            found.append((match[2], sum(_bytes(*shape) for shape in shapes)))
    return found


def _bytes(dtype: str, dims: str) -> int:
    return SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n)


class Autoencoder(nn.Module):
    """784-1000-500-250-30 and back."""

    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(size)(x)


def measure(model: nn.Module, features: int, batch_size: int) -> dict[str, object]:
    """Compiles the steps and lists their collectives.

    Args:
      model: An autoencoder of ``features`` numbers.
      features: Inputs and outputs of the model.
      batch_size: Examples on all devices together.

    Returns:
      By program: kinds and bytes; and the bytes of rows and of factors.
    """
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    batch = jnp.zeros((batch_size, features))
    params = jax.jit(model.init)(jax.random.key(0), batch[:1])

    def loss_fn(params, x):
        return jnp.mean(jnp.sum((model.apply(params, x) - x) ** 2, -1))

    def make_step(tx, estimator=None, mean=lambda x: x):
        def step(params, state, curvature, x, rng):
            loss, grads = jax.value_and_grad(lambda p: mean(loss_fn(p, x)))(params)
            extra = {}
            if estimator is not None:
                curvature = estimator.update(curvature, params, x, rng=rng)
                extra = {
                    "curvature": curvature,
                    "value": loss,
                    "value_fn": lambda p: mean(loss_fn(p, x)),
                }
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state, curvature, loss

        return step

    def text(step, state, curvature, in_jit):
        where = NamedSharding(mesh, P("data")) if in_jit else None
        whole = NamedSharding(mesh, P()) if in_jit else None
        compiled = jax.jit(
            step, in_shardings=(whole, whole, whole, where, whole) if in_jit else None
        ).lower(params, state, curvature, batch, jax.random.key(1))
        return collectives(compiled.compile().as_text())

    adam, tx = optax.adam(1e-3), optax_cgfac.cgfac()
    estimate = functools.partial(
        optax_cgfac.fisher_estimator, model.apply, "squared_error"
    )
    plain, split = estimate(), estimate(axis_name="data")
    curvature = plain.init(params, batch)
    specs = split.init(params, batch).partition_specs("data")
    mapped = jax.shard_map(
        make_step(tx, split, functools.partial(jax.lax.pmean, axis_name="data")),
        mesh=mesh,
        in_specs=(P(), P(), specs, P("data"), P()),
        out_specs=(P(), P(), specs, P()),
    )

    def kfac_step(params, curvature, x, rng):
        """What the devices of K-FAC agree on: the gradient, and the factors."""
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        curvature = few.update(curvature, params, x, rng=rng)
        factors = [curvature.operator(tag.name).factors() for tag in curvature.tags]
        return jax.lax.pmean((loss, grads, factors), "data")

    # A capture from each device's own examples. Nothing is known to vary, so that it
    # is the estimator of a single device.
    few = estimate(rows=8, model_rows=8, rows_dtype="float32", rank=None)
    kfac = jax.shard_map(
        kfac_step,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    programs = {
        "Adam, jit": text(make_step(adam), adam.init(params), (), True),
        "cgfac, jit": text(make_step(tx, plain), tx.init(params), curvature, True),
        "cgfac, shard_map": text(
            mapped, tx.init(params), split.init(params, batch), False
        ),
        "K-FAC, shard_map": collectives(
            jax.jit(kfac)
            .lower(params, few.init(params, batch), batch, jax.random.key(1))
            .compile()
            .as_text()
        ),
    }
    tags = curvature.tags
    return {
        "devices": devices,
        "batch": batch_size,
        "parameters": 4 * sum(x.size for x in jax.tree.leaves(params)),
        "rows of one update": sum(
            tag.rows_per_step
            * (tag.n_in + tag.n_out)
            * jnp.dtype(curvature.spec.rows_dtype_of(tag)).itemsize
            for tag in tags
        ),
        "factors of K-FAC": sum(4 * (tag.n_in**2 + tag.n_out**2) for tag in tags),
        "programs": programs,
    }


def table(result: dict[str, object]) -> str:
    """Returns a Markdown table of a measurement."""
    lines = ["| program | collective | how many | KiB |", "|---|---|---:|---:|"]
    for name, found in result["programs"].items():
        by_kind = collections.defaultdict(list)
        for kind, size in found:
            by_kind[kind].append(size)
        for kind, sizes in sorted(by_kind.items()):
            lines.append(
                f"| {name} | {kind} | {len(sizes)} | {sum(sizes) / 1024:,.1f} |"
            )
    lines.append("")
    if "kfac-jax" in result:
        versions = result["kfac-jax"]
        lines += [
            f"(kfac-jax {versions['kfac-jax']} with jax {versions['jax']}, the others "
            f"with jax {result['jax']}.)",
            "",
        ]
    for name in ("parameters", "rows of one update", "factors of K-FAC"):
        lines.append(f"{name}: {result[name] / 1024:,.1f} KiB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1024, help="examples (1024)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the result")
    args = parser.parse_args(argv)
    if jax.device_count() < 2:
        parser.error("needs several devices: see --help for the flag")
    result = measure(Autoencoder(), 784, args.batch)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, **result}, indent=1))


if __name__ == "__main__":
    main()
