import os
from pathlib import Path

import jax
import pytest

# Nearly all of the suite's time is XLA compiling small programs. Optimizations more
# than double it (set JAX_DISABLE_MOST_OPTIMIZATIONS=0 to have them), and the cache on
# disk lets processes and runs share what they compile.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = Path(__file__).parents[1] / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both precisions, the second inside `jax.enable_x64`."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
