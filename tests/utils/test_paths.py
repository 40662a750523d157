"""One name for a parameter, whatever holds it."""

import jax
import pytest
from flax import core
from flax import linen as nn

from optax_cgfac.utils.paths import leaves_by_path, map_with_path, normalize, text

PLAIN = {"encoder": {"kernel": 1.0, "bias": 2.0}}


@pytest.mark.parametrize(
    "tree",
    [
        PLAIN,
        core.freeze(PLAIN),
        {"encoder": {"kernel": nn.Partitioned(1.0, (None,)), "bias": 2.0}},
    ],
    ids=["dict", "FrozenDict", "Partitioned"],
)
def test_boxes_and_frozen_dicts_change_no_name(tree):
    assert leaves_by_path(tree) == {
        ("encoder", "kernel"): 1.0,
        ("encoder", "bias"): 2.0,
    }


def test_a_parameter_called_value_keeps_its_name_at_the_root():
    [(path, _)] = jax.tree_util.tree_leaves_with_path({"value": 1.0})
    assert normalize(path) == ("value",)


def test_positions_in_sequences_are_numbers():
    assert list(leaves_by_path([{"w": 1.0}, (2.0,)])) == [("0", "w"), ("1", "0")]


def test_map_with_path_hands_over_the_path_and_all_leaves():
    doubled = {"encoder": {"kernel": 10.0, "bias": 20.0}}
    result = map_with_path(lambda path, x, y: (text(path), x + y), PLAIN, doubled)
    assert result["encoder"]["kernel"] == ("encoder/kernel", 11.0)
    assert result["encoder"]["bias"] == ("encoder/bias", 22.0)
