"""The code of docs/devices.md, on eight devices."""

import jax
import numpy as np

import pages


def test_the_page_runs_and_its_two_ways_train():
    names = pages.run(pages.ROOT / "docs" / "devices.md")
    assert names["mesh"].size == 8
    assert len(names["batch"]["x"].sharding.device_set) == 8
    assert int(names["opt_state"].cgfac_count) == 2
    first = names["loss_fn"](
        names["model"].init(jax.random.key(1), names["x"]), names["batch"]
    )
    assert float(names["loss"]) < float(first)
    assert np.all(np.isfinite(jax.tree.leaves(names["params"])[0]))
