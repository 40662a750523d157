"""What a step of `cgfac` costs for a large transformer, by counting.

    python benchmarks/scale.py                       # 1.2 billion parameters
    python benchmarks/scale.py --width 4096 --blocks 32 --devices 1024
    XLA_FLAGS=--xla_force_host_platform_device_count=8 OPENBLAS_NUM_THREADS=1 \\
        python benchmarks/scale.py --measure         # the same counts, by XLA

It counts matrices of blocks (query, key, value, output, two of the feed-forward), not
embeddings and attention itself; operations are multiplications and additions. With
``--measure`` a small model of such matrices is compiled, and XLA's own count of the
operations of each device stands beside the model's.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any


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
    # Gram matrices of the window, products with the old eigenvectors, their lifting.
    refresh = 2 * window * sides * (window + 2 * t.rank)
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
            "solve, on every device": 8 * t.rank * n * t.devices,
            "solve, spread by solve_axis": 8 * t.rank * n,
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
    estimator = optax_cgfac.fisher_estimator(
        model.apply,
        "squared_error",
        rows=t.rows,
        window=t.window,
        rank=t.rank,
        model_rows=t.model_rows,
        capture_every=t.capture_every,
    )
    curvature = estimator.init(params, x)
    tx = optax_cgfac.scale_by_cgfac(0.1, damping_form="factored")
    mesh = jax.make_mesh((t.devices,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def operations(function, shardings, *args):
        lowered = jax.jit(function, in_shardings=shardings).lower(*args)
        return t.devices * lowered.compile().cost_analysis()["flops"]

    def gradient(params, x):
        return jax.grad(lambda p: jnp.mean(jnp.sum(model.apply(p, x) ** 2, -1)))(params)

    # Without eigenpairs an update is a capture.
    plain = optax_cgfac.fisher_estimator(
        model.apply,
        "squared_error",
        rows=t.rows,
        window=t.window,
        rank=None,
        capture_every=1,
    )
    rows = plain.init(params, x)

    def capture(rows, params, x, rng):
        return plain.update(rows, params, x, rng=rng)

    def solve(grads, params, curvature):
        return tx.update(grads, tx.init(params), params, curvature=curvature)[0]

    compiled = {
        "gradient": operations(gradient, (whole, split), params, x),
        "capture": operations(
            capture, (whole, whole, split, whole), rows, params, x, jax.random.key(1)
        ),
        "solve, on every device": operations(
            solve, (whole, whole, whole), params, params, curvature
        ),
    }
    counted = count(t)["operations of a step"]
    return {
        "jax": jax.__version__,
        "transformer": dataclasses.asdict(t),
        "parts": {
            name: {"counted": counted[name], "compiled": value}
            for name, value in compiled.items()
        },
    }


def measured_table(result: dict[str, Any]) -> str:
    """Returns a Markdown table of `measure`."""
    lines = ["| operations of a step | counted | by XLA | |", "|---|---:|---:|---:|"]
    for name, part in result["parts"].items():
        ratio = part["compiled"] / part["counted"]
        figures = human(part["counted"]), human(part["compiled"])
        lines.append(f"| {name} | {figures[0]} | {figures[1]} | {ratio:.2f} |")
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
