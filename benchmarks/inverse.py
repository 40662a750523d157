"""Ways to invert the small matrices of a step: XLA's own blocks against LAPACK.

A step with factored damping inverts one positive definite matrix per side of every
layer. On CPUs LAPACK's BLAS and XLA have threads of their own, which wait for each
other; run this beside a busy process to see it.

    python benchmarks/inverse.py
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from curves import environment

from optax_cgfac.utils.linalg import blocked_inverse
from optax_cgfac.utils.linalg import cholesky_inverse


def one_by_one(matrices):
    """A LAPACK factorisation and solve for every matrix."""

    def invert(matrix):
        factor = (jnp.linalg.cholesky(matrix), True)
        return jax.scipy.linalg.cho_solve(factor, jnp.eye(len(matrix)))

    return jnp.stack([invert(matrix) for matrix in matrices])


def main(argv=None):
    """Times the ways in turn and returns the medians in seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=14, help="matrices")
    parser.add_argument("--size", type=int, default=256, help="their size")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each")
    args = parser.parse_args(argv)
    rows = jax.random.normal(jax.random.key(0), (args.count, args.size, 4 * args.size))
    decay = jnp.exp(-jnp.arange(rows.shape[-1]) / (args.size / 5))
    matrices = rows * decay @ rows.mT / args.size + 1e-3 * jnp.eye(args.size)
    exact = np.linalg.inv(np.asarray(matrices, np.float64))

    ways = {
        "LAPACK, one by one": one_by_one,
        "LAPACK, batched": cholesky_inverse,
        "XLA, blocked": blocked_inverse,
    }
    compiled = {
        name: jax.jit(way).lower(matrices).compile() for name, way in ways.items()
    }
    times = {name: [] for name in ways}
    for i in range(args.repeats + 1):
        for name, way in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(way(matrices))
            if i:  # the first is for the caches
                times[name].append(time.perf_counter() - start)
    for key, value in environment().items():
        print(f"{key:13}{value}")
    print(f"\n{args.count} matrices of size {args.size}, median of {args.repeats}")
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    for name, seconds in medians.items():
        error = np.linalg.norm(compiled[name](matrices) - exact) / np.linalg.norm(exact)
        print(f"{name:20} {1e3 * seconds:8.1f} ms   relative error {error:.1e}")
    return medians


if __name__ == "__main__":
    main()
