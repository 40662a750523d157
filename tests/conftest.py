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


# In Linux a process may have 65,530 pieces of memory; a program takes about 20 of them,
# and XLA crashes where no more are to be had.
MOST_PIECES = 20_000


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """After a module: what was compiled so far, if that is a lot."""
    yield
    pieces = Path("/proc/self/maps")
    if pieces.exists() and pieces.read_bytes().count(b"\n") > MOST_PIECES:
        jax.clear_caches()


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both precisions, the second inside `jax.enable_x64`."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
