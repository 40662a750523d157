r"""The exact Fisher of a layer, or of several together, from rows by example.

The gradient of an example (more exactly, of one drawn target of it) is the sum of its
rows' outer products, :math:`d_m = \sum_p a_{mp} g_{mp}ᵀ`. With these ``M`` gradients as
the rows of a matrix ``D``, the Fisher is ``F = s DᵀD``, and all that a solve needs of
it is the ``M x M`` matrix ``K = DDᵀ``: for one row an example, ``K = (a aᵀ) ∘ (g gᵀ)``.

Ren & Goldfarb (2019), "Efficient subsampled Gauss-Newton and natural gradient methods
for training neural networks", section 3.
"""

from collections.abc import Sequence

from optax_cgfac.layers.layer import LayerTag
from optax_cgfac.operators.exact_fisher import BlockFisherOperator


def check_units(
    blocks: Sequence[BlockFisherOperator], tags: Sequence[LayerTag]
) -> None:
    """Checks that the layers have gradients of the same examples.

    Raises:
      ValueError: If one has not.
    """
    for tag, block in zip(tags, blocks, strict=True):
        if tag.sharing > 1 or block.num_units != blocks[0].num_units:
            raise ValueError(
                f"Layer {tag.name!r} has one input for all examples, so that no "
                "example has a gradient of its own in it. Leave it out of the "
                "structure 'full' by fisher_estimator(..., where=...)."
            )
