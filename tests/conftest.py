import jax
import pytest


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both precisions, the second inside `jax.enable_x64`."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
