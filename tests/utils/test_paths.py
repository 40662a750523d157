"""One name for a parameter, whatever holds it."""

import pytest
from flax import core
from flax import linen as nn

from optax_cgfac.utils.paths import leaves_by_path, map_with_path, text

PLAIN = {"encoder": {"kernel": 1.0, "bias": 2.0}}
NAMED = {("encoder", "kernel"): 1.0, ("encoder", "bias"): 2.0}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (PLAIN, NAMED),
        (core.freeze(PLAIN), NAMED),
        ({"encoder": {"kernel": nn.Partitioned(1.0, (None,)), "bias": 2.0}}, NAMED),
        ({"value": 1.0}, {("value",): 1.0}),
        ([{"w": 1.0}, (2.0,)], {("0", "w"): 1.0, ("1", "0"): 2.0}),
    ],
    ids=["dict", "FrozenDict", "Partitioned", "called value", "sequences"],
)
def test_boxes_and_containers_change_no_name(tree, expected):
    assert leaves_by_path(tree) == expected


def test_map_with_path_hands_over_the_path_and_all_leaves():
    doubled = {"encoder": {"kernel": 10.0, "bias": 20.0}}
    result = map_with_path(lambda path, x, y: (text(path), x + y), PLAIN, doubled)
    assert result["encoder"]["kernel"] == ("encoder/kernel", 11.0)
    assert result["encoder"]["bias"] == ("encoder/bias", 22.0)
