"""`check_gradients` finds parameters that act by another way than their layer."""

import jax.numpy as jnp
import pytest
from flax import linen as nn

import optax_cgfac
from models import BATCH, COMPACT, NUM_EXAMPLES, Compact, Scanned, init, normal

PARAMS = init(Compact(), BATCH)


def loss_fn(params, penalty):
    outputs = Compact().apply({"params": params}, BATCH)
    penalty = penalty * jnp.sum(params["Dense_1"]["kernel"] ** 2)
    return jnp.mean(jnp.sum(outputs**2, -1)) + penalty


@pytest.mark.parametrize("penalty", [0.0, 1.0, jnp.nan])
def test_a_penalty_on_a_kernel_is_found(penalty):
    check = optax_cgfac.check_gradients(loss_fn, PARAMS, penalty)
    names = {f"{n}/{p}" for n in COMPACT for p in ("kernel", "bias")}
    assert set(check.errors) == names
    wrong = ("Dense_1/kernel",) if penalty else ()
    assert check.mismatches == wrong
    for name in names:
        assert f"{name}: {'MISMATCH' if name in wrong else 'ok'}" in str(check)


def test_a_sum_is_no_mean():
    check = optax_cgfac.check_gradients(
        lambda p: NUM_EXAMPLES * loss_fn(p, 0.0), PARAMS, loss_reduction="sum"
    )
    assert check.mismatches == ()


def test_a_kernel_that_is_transformed_on_the_way_is_found():
    def halved(params):
        params = params | {
            "Dense_0": params["Dense_0"] | {"kernel": params["Dense_0"]["kernel"] / 2}
        }
        return loss_fn(params, 0.0)

    check = optax_cgfac.check_gradients(halved, PARAMS)
    assert check.mismatches == ("Dense_0/kernel",)


def test_uncovered_parameters_are_listed_with_the_reason():
    model = Scanned(axes=False)
    params = init(model, normal(0, NUM_EXAMPLES, 5))
    check = optax_cgfac.check_gradients(
        lambda p: jnp.mean(model.apply({"params": p}, BATCH) ** 2), params
    )
    assert "blocks/Dense_0/kernel" in check.uncovered
    assert "blocks/Dense_0/kernel: uncovered, its Dense runs below" in str(check)


class Broken(nn.Module):
    """Tags a layer with an output that the parameters did not make."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return optax_cgfac.tag_layer(self, x**2, scale * x, scale="scale")


def test_a_wrong_tag_is_found():
    model = Broken()
    params = init(model, BATCH)
    check = optax_cgfac.check_gradients(
        lambda p: jnp.mean(jnp.sum(model.apply({"params": p}, BATCH) ** 3, -1)), params
    )
    assert check.mismatches == ("scale",)
