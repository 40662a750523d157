"""What a step of `cgfac` costs for a large transformer, by counting.

    python benchmarks/scale.py                       # 1.2 billion parameters
    python benchmarks/scale.py --width 4096 --blocks 32 --devices 1024

A model and no measurement. It counts matrices of blocks (query, key, value, output,
two of the feed-forward), not embeddings; operations are multiplications and additions.
"""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder and how it is trained.

    Attributes:
      width: ``d``; the feed-forward has ``4 d`` units.
      blocks: How many.
      length: Tokens of a sequence.
      sequences: Of a batch, on all devices.
      devices: How many share it.
      rows: Sequences captured per update, one position of each.
      window: Captures that are kept.
      rank: Eigenpairs of each factor.
      capture_every: Updates between captures.
      refresh_every: Captures between renewals of eigenpairs.
      model_rows: Sequences of the quadratic model.
    """

    width: int = 2048
    blocks: int = 24
    length: int = 2048
    sequences: int = 512
    devices: int = 256
    rows: int = 32
    window: int = 8
    rank: int = 64
    capture_every: int = 1
    refresh_every: int = 8
    model_rows: int = 32

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every matrix."""
        d = self.width
        return [*[(d, d)] * 4, (d, 4 * d), (4 * d, d)] * self.blocks


def count(t: Transformer) -> dict[str, dict[str, float]]:
    """Returns operations of all devices and bytes, by what they are for."""
    n = sum(n_in * n_out for n_in, n_out in t.matrices)
    sides = sum(n_in + n_out for n_in, n_out in t.matrices)
    squares = sum(n_in**2 + n_out**2 for n_in, n_out in t.matrices)
    cubes = sum(n_in**3 + n_out**3 for n_in, n_out in t.matrices)
    window = t.window * t.rows
    # A pass forward is 2 operations a weight and token, one backward 4.
    token = 2 * n
    captured = t.rows * t.length
    # Gram matrices of the window, products with the old eigenvectors, their lifting.
    refresh = 2 * window * sides * (window + 2 * t.rank)
    return {
        "operations of a step": {
            "gradient": 3 * token * t.sequences * t.length,
            "capture": 3 * token * captured / t.capture_every,
            "quadratic model, 2 directions": 5 * token * t.model_rows * t.length,
            "renewed eigenpairs": refresh / (t.capture_every * t.refresh_every),
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


def table(t: Transformer) -> str:
    """Returns a Markdown table."""
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
    for field in dataclasses.fields(Transformer):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(
            name, type=int, default=field.default, help=f"{field.default}"
        )
    transformer = Transformer(**vars(parser.parse_args(argv)))
    n = sum(n_in * n_out for n_in, n_out in transformer.matrices)
    print(f"{transformer}\n{human(n)} weights\n")
    print(table(transformer))


if __name__ == "__main__":
    main()
