"""Whether the arrays of a curvature are those that its static part describes."""

import jax

from optax_cgfac._curvature import Curvature, empty_curvature
from optax_cgfac.utils.paths import leaves_by_path, text


def check_rows(curvature: Curvature) -> None:
    """Checks shapes and dtypes of rows and eigenpairs.

    A curvature that was restored into another one's place, or of which several are
    stacked, would otherwise fail deep inside a solve, or not at all.

    Args:
      curvature: The curvature.

    Raises:
      ValueError: If an array is another than the layers ask for.
    """
    like = jax.eval_shape(lambda: empty_curvature(curvature.spec))
    expected = leaves_by_path({"layers": like.layers, "spectra": like.spectra})
    got = leaves_by_path({"layers": curvature.layers, "spectra": curvature.spectra})
    for path in sorted(expected.keys() | got.keys()):
        texts = [
            f"{leaves[path].dtype} {leaves[path].shape}" if path in leaves else "none"
            for leaves in (expected, got)
        ]
        if texts[0] != texts[1]:
            raise ValueError(
                f"The array {text(path)!r} of the curvature does not fit its layers.\n"
                f"  expected: {texts[0]}\n  got:      {texts[1]}\n"
                "It is of another window, number of rows or dtype, or several "
                "curvatures are stacked. Pass what estimator.init or estimator.update "
                "returned, restore checkpoints into the former, and use stacked ones "
                "inside jax.vmap."
            )
