"""The same seed gives the same run, bit for bit, compiled anew or not."""

import jax
import numpy as np
import pytest

from steps import TRANSFORMS, problem
from troubled import Trouble, runner, steps, transformation


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_seed_gives_the_same_run(name):
    """`test_checkpoints` has runs of two processes, and restored ones."""
    p = problem()
    runs = []
    for _ in range(2):  # a new function is traced and compiled again
        tx = transformation(name)
        run = runner(p, tx)
        runs += [run(p.start(tx), steps(*[Trouble()] * 8)) for _ in range(2)]
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, runs[0])
    # The comparison would see another seed.
    assert np.ptp(runs[0][1].losses) > 0
