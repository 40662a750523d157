"""Small Linen and NNX models, one table of them, and what must be found in each.

`table` has the models that are covered whole, `reported` those with parameters that
cannot be; `linen_modules` and `nnx_modules` hold the modules that need a class.
"""

from models.common import (
    BATCH,
    NUM_EXAMPLES,
    Case,
    assert_close,
    by_name,
    init,
    normal,
    rebuild_gradients,
)
from models.linen_modules import Compact, Heads, JitMethod, Scanned
from models.table import CASES, COMPACT, LAYER_CASES

__all__ = [
    "BATCH",
    "CASES",
    "COMPACT",
    "LAYER_CASES",
    "NUM_EXAMPLES",
    "Case",
    "Compact",
    "Heads",
    "JitMethod",
    "Scanned",
    "assert_close",
    "by_name",
    "init",
    "normal",
    "rebuild_gradients",
]
