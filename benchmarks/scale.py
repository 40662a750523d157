"""What a step of `cgfac` costs for a large transformer, by counting.

    python benchmarks/scale.py                       # 1.2 billion parameters
    python benchmarks/scale.py --width 4096 --blocks 32 --devices 1024
    XLA_FLAGS=--xla_force_host_platform_device_count=8 OPENBLAS_NUM_THREADS=1 \\
        python benchmarks/scale.py --measure         # the same counts, by XLA

It counts matrices of blocks (query, key, value, output, two of the feed-forward), not
embeddings and attention itself; operations are multiplications and additions of matrix
products, those of the busiest device times the number of devices. With ``--measure`` a
small model of such matrices is compiled: XLA's own count of operations and the bytes of
its collectives stand beside the model's.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from optax_cgfac.solve.spread import assign


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder and how it is trained.

    Attributes:
      width: ``d``; the feed-forward has ``4 d`` units.
      blocks: How many.
      length: Tokens of a sequence.
      sequences: Of a batch, on all devices.
      devices: How many share it.
      rows: Sequences captured per update, one position of each: as many as devices,
        so that each captures one.
      window: Captures that are kept.
      rank: Eigenpairs of each factor.
      capture_every: Updates between captures; the default of so many rows.
      refresh_every: Captures between renewals of eigenpairs.
      model_rows: Sequences of the quadratic model.
      model_every: Updates between two fits of it; the default of so many sequences.
    """

    width: int = 2048
    blocks: int = 24
    length: int = 2048
    sequences: int = 512
    devices: int = 256
    rows: int = 256
    window: int = 2
    rank: int = 64
    capture_every: int = 8
    refresh_every: int = 8
    model_rows: int = 256
    model_every: int = 7

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every matrix."""
        d = self.width
        return [*[(d, d)] * 4, (d, 4 * d), (4 * d, d)] * self.blocks

    def shared(self, sequences: int) -> int:
        """Returns how many sequences all devices compute together of so many.

        Every device as many as the busiest one: less than one is not possible.
        """
        return self.devices * math.ceil(sequences / self.devices)


SMALL = Transformer(
    width=64,
    blocks=2,
    length=16,
    sequences=64,
    devices=8,
    rows=32,
    window=2,
    rank=16,
    capture_every=1,
    refresh_every=1,
    model_rows=32,
    model_every=1,
)


def count(t: Transformer) -> dict[str, dict[str, float]]:
    """Returns operations of all devices and bytes, by what they are for."""
    n = sum(n_in * n_out for n_in, n_out in t.matrices)
    sides = sum(n_in + n_out for n_in, n_out in t.matrices)
    squares = sum(n_in**2 + n_out**2 for n_in, n_out in t.matrices)
    cubes = sum(n_in**3 + n_out**3 for n_in, n_out in t.matrices)
    window = t.window * t.rows
    # 2 operations a weight and token forward, 2 back to the inputs, 2 to the weights;
    # a capture leaves out the last, and a tangent is 4.
    token = 2 * n * t.length
    solves = [8 * t.rank * n_in * n_out for n_in, n_out in t.matrices]
    busiest = max(
        sum(solves[i] for i in chosen) for chosen in assign(solves, t.devices)
    )
    # Gram matrices of the window, products with the old eigenvectors, their lifting;
    # a power step and a projection of the Gram matrices.
    refresh = 2 * window * sides * (window + 2 * t.rank)
    refresh += 2 * 2 * window**2 * t.rank * 2 * len(t.matrices)
    return {
        "operations of a step": {
            "gradient": 3 * token * t.shared(t.sequences),
            "capture": 2 * token * t.shared(t.rows) / t.capture_every,
            "quadratic model, 2 directions": 5
            * token
            * t.shared(t.model_rows)
            / t.model_every,
            "renewed eigenpairs, on every device": refresh
            * t.devices
            / (t.capture_every * t.refresh_every),
            "solve, on every device": sum(solves) * t.devices,
            "solve, spread by solve_axis": busiest * t.devices,
            "K-FAC: eigendecompositions": 9 * cubes,
        },
        "bytes on a device": {
            "parameters, float32": 4 * n,
            "velocity, float32": 4 * n,
            "window of rows, bfloat16": 2 * window * sides,
            "eigenpairs, float32": 4 * t.rank * sides,
            "K-FAC: factors, float32": 4 * squares,
        },
        "bytes between devices in a step": {
            "gradient, float32": 4 * n,
            "new rows, bfloat16": 2 * t.rows * sides / t.capture_every,
            "solutions, float32, with solve_axis": 4 * n,
            "K-FAC: factors, float32": 4 * squares,
        },
    }


def measure(t: Transformer) -> dict[str, Any]:
    """Compiles the parts of a step, and returns XLA's operations beside the model's.

    Args:
      t: A small one, on the devices that there are.

    Returns:
      By part: ``counted`` and ``compiled``, operations of all devices.
    """
    import jax
    import jax.numpy as jnp
    from collectives import collectives
    from flax import linen as nn
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import optax_cgfac

    class Blocks(nn.Module):
        """The matrices of a decoder, without attention."""

        @nn.compact
        def __call__(self, x):
            def dense(size):
                return nn.Dense(size, use_bias=False)

            for _ in range(t.blocks):
                heads = [dense(t.width)(x) for _ in range(3)]
                x = x + dense(t.width)(nn.tanh(sum(heads)))
                x = x + dense(t.width)(nn.tanh(dense(4 * t.width)(x)))
            return x

    model = Blocks()
    x = jnp.zeros((t.sequences, t.length, t.width))
    params = model.init(jax.random.key(0), x[:1])
    estimate = functools.partial(
        optax_cgfac.fisher_estimator,
        model.apply,
        "squared_error",
        rows=t.rows,
        window=t.window,
        model_rows=t.model_rows,
        capture_every=1,
    )
    # Without eigenpairs an update is a capture; with them it renews them as well.
    plain, ranked = estimate(rank=None), estimate(rank=t.rank, refresh_every=1)
    rows, curvature = plain.init(params, x), ranked.init(params, x)
    mesh = jax.make_mesh((t.devices,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    placed = {id(x): split}
    for state in (rows, curvature):
        specs = state.partition_specs("data")
        placed[id(state)] = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def compiled(function: Callable[..., Any], *args: Any) -> tuple[float, float]:
        """Operations of all devices, and the bytes they send."""
        shardings = tuple(placed.get(id(arg), whole) for arg in args)
        with jax.set_mesh(mesh):
            program = jax.jit(function, in_shardings=shardings).lower(*args).compile()
        sent = sum(size for _, size in collectives(program.as_text()))
        return t.devices * program.cost_analysis()["flops"], sent

    def tree_bytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    def gradient(params, x):
        return jax.grad(lambda p: jnp.mean(jnp.sum(model.apply(p, x) ** 2, -1)))(params)

    def update(estimator):
        return lambda rows, params, x, rng: estimator.update(rows, params, x, rng=rng)

    def solve(tx, **extra):
        def run(grads, params, curvature):
            state = tx.init(params)
            return tx.update(grads, state, params, curvature=curvature, **extra)[0]

        return run

    key = jax.random.key(1)
    damped = functools.partial(optax_cgfac.scale_by_cgfac, 0.1, damping_form="factored")
    captured = compiled(update(plain), rows, params, x, key)
    renewed = compiled(update(ranked), curvature, params, x, key)
    solved = compiled(solve(damped()), params, params, curvature)
    spread = compiled(solve(damped(solve_axis="data")), params, params, curvature)
    modelled = compiled(
        solve(optax_cgfac.cgfac(model_interval=1), value=0.0, value_fn=lambda _: 0.0),
        params,
        params,
        curvature,
    )
    of_gradient = compiled(gradient, params, x)
    operations = {
        "gradient": of_gradient[0],
        "capture": captured[0],
        "quadratic model, 2 directions": modelled[0] - solved[0],
        "renewed eigenpairs, on every device": renewed[0] - captured[0],
        "solve, on every device": solved[0],
        "solve, spread by solve_axis": spread[0],
    }
    sent = {
        "gradient, float32": of_gradient[1],
        "new rows, bfloat16": captured[1],
        "solutions, float32, with solve_axis": spread[1],
    }
    held = {
        "window of rows, bfloat16": tree_bytes(curvature.layers),
        "eigenpairs, float32": tree_bytes(curvature.spectra),
    }
    parts = {
        "operations of a step": operations,
        "bytes on a device": held,
        "bytes between devices in a step": sent,
    }
    return {
        "jax": jax.__version__,
        "transformer": dataclasses.asdict(t),
        "parts": {
            title: {
                name: {"counted": count(t)[title][name], "compiled": value}
                for name, value in found.items()
            }
            for title, found in parts.items()
        },
    }


def measured_table(result: dict[str, Any]) -> str:
    """Returns Markdown tables of `measure`."""
    lines = []
    for title, parts in result["parts"].items():
        lines += [f"| {title} | counted | compiled | |", "|---|---:|---:|---:|"]
        for name, part in parts.items():
            ratio = part["compiled"] / part["counted"]
            figures = human(part["counted"]), human(part["compiled"])
            lines.append(f"| {name} | {figures[0]} | {figures[1]} | {ratio:.2f} |")
        lines.append("")
    return "\n".join(lines)


def table(t: Transformer) -> str:
    """Returns Markdown tables of `count`."""
    lines = []
    for title, figures in count(t).items():
        first = next(iter(figures.values()))
        lines += [f"| {title} | | of the first |", "|---|---:|---:|"]
        for name, value in figures.items():
            lines.append(f"| {name} | {human(value)} | {value / first:.2g} |")
        lines.append("")
    return "\n".join(lines)


def human(value: float) -> str:
    """Returns a number with a prefix."""
    power = 0
    while value >= 1000:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="compile a small one")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the measured")
    for field in dataclasses.fields(Transformer):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(
            name, type=int, default=field.default, help=f"{field.default}"
        )
    args = vars(parser.parse_args(argv))
    path = args.pop("json")
    if args.pop("measure"):
        result = measure(SMALL)
        print(measured_table(result))
        if path:
            path.write_text(json.dumps(result, indent=1) + "\n")
        return
    transformer = Transformer(**args)
    n = sum(n_in * n_out for n_in, n_out in transformer.matrices)
    print(f"{transformer}\n{human(n)} weights\n")
    print(table(transformer))


if __name__ == "__main__":
    main()
