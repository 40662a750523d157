"""K-FAC's natural gradient by conjugate gradients, as an Optax transformation."""

from optax_cgfac.capture.linen.tap import capture_axes
from optax_cgfac.capture.nnx.layers import CaptureVariable
from optax_cgfac.capture.tag_layer import tag_layer
from optax_cgfac.curvature.check_gradients import check_gradients
from optax_cgfac.curvature.curvature import Curvature
from optax_cgfac.curvature.estimator import CurvatureEstimator, fisher_estimator
from optax_cgfac.curvature.single_pass import value_and_grad
from optax_cgfac.operators.exact_fisher import BlockFisherOperator, FullFisherOperator
from optax_cgfac.operators.kronecker import (
    DampedOperator,
    FactoredDampedOperator,
    KroneckerOperator,
)
from optax_cgfac.optimize.cgfac import cgfac
from optax_cgfac.optimize.diagnostics import diagnostics
from optax_cgfac.optimize.scale_by import (
    ScaleByCGFACState,
    scale_by_cgfac,
    scale_by_kfac,
)
from optax_cgfac.optimize.state import CGFACState
from optax_cgfac.problem.loss import Loss
from optax_cgfac.solve.cg import conjugate_gradient
from optax_cgfac.solve.info import CGInfo, StopReason
from optax_cgfac.train_state import TrainState

__all__ = [
    "BlockFisherOperator",
    "CGFACState",
    "CGInfo",
    "CaptureVariable",
    "Curvature",
    "CurvatureEstimator",
    "DampedOperator",
    "FactoredDampedOperator",
    "FullFisherOperator",
    "KroneckerOperator",
    "Loss",
    "ScaleByCGFACState",
    "StopReason",
    "TrainState",
    "capture_axes",
    "cgfac",
    "check_gradients",
    "conjugate_gradient",
    "diagnostics",
    "fisher_estimator",
    "scale_by_cgfac",
    "scale_by_kfac",
    "tag_layer",
    "value_and_grad",
]
