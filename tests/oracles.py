"""Dense float64 answers from textbook formulas; shares no code with the package.

A layer's matrix is vectorised row by row, so that ``A V G`` is ``kron(A, G) @ v``.
"""

import jax
import jax.numpy as jnp
import numpy as np


def float64(array):
    return np.asarray(array, np.float64)


def relative_error(actual, expected):
    """The Euclidean norm of the difference over that of ``expected``."""
    actual, expected = float64(actual), float64(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def tolerance(dtype, condition=1.0):
    """What rounding may do to the solution of a system of this condition number.

    The constant covers sums over at most a few hundred terms.
    """
    return 50 * float(np.finfo(dtype).eps) * condition


def moment(rows, scale=None):
    """``rowsᵀ rows``, a mean over rows by default."""
    rows = float64(rows)
    return rows.T @ rows * (1 / len(rows) if scale is None else scale)


def kronecker(a, g):
    """``A ⊗ G`` of captured rows."""
    return np.kron(moment(a), moment(g))


def tikhonov(a, g, damping):
    return kronecker(a, g) + damping * np.eye(a.shape[1] * g.shape[1])


def factored_dampings(a, g, damping):
    """``α = π√γ``, ``β = √γ/π`` with π of Martens & Grosse (2015), section 6.3."""
    a_factor, g_factor = moment(a), moment(g)
    mean_a = np.trace(a_factor) / len(a_factor)
    mean_g = np.trace(g_factor) / len(g_factor)
    pi = np.sqrt(mean_a / mean_g)
    return pi * np.sqrt(damping), np.sqrt(damping) / pi


def factored(a, g, damping):
    alpha, beta = factored_dampings(a, g, damping)
    return np.kron(
        moment(a) + alpha * np.eye(a.shape[1]), moment(g) + beta * np.eye(g.shape[1])
    )


DAMPED = {"tikhonov": tikhonov, "factored": factored}


def apply(dense, matrix):
    return (float64(dense) @ float64(matrix).reshape(-1)).reshape(matrix.shape)


def solve(dense, b):
    return np.linalg.solve(float64(dense), float64(b).reshape(-1)).reshape(b.shape)


def algorithm2_product(a, g, matrix):
    """``FV = a (aᵀ V g) gᵀ`` for one example, Chen (2021), Algorithm 2."""
    a, g = float64(a), float64(g)
    return np.outer(a, g) * (a @ float64(matrix) @ g)


def cg_iterates(dense, b, x0, num_steps, preconditioner=None):
    """The iterates of (preconditioned) conjugate gradients, one per step."""
    dense, b, x = float64(dense), float64(b).reshape(-1), float64(x0).reshape(-1)
    weights = 1.0 if preconditioner is None else float64(preconditioner).reshape(-1)
    residual = b - dense @ x
    z = weights * residual
    direction, iterates = z, []
    for _ in range(num_steps):
        step_size = (residual @ z) / (direction @ dense @ direction)
        x = x + step_size * direction
        new_residual = residual - step_size * (dense @ direction)
        new_z = weights * new_residual
        momentum = (new_residual @ new_z) / (residual @ z)
        direction = new_z + momentum * direction
        residual, z = new_residual, new_z
        iterates.append(x.reshape(np.shape(x0)))
    return iterates


def gauss_newton(outputs, x, loss, factors=None):
    """``Σ factor Jᵀ H J`` over predictions, by default their mean.

    ``outputs(x)`` has a prediction on its last axis, and ``loss`` takes one.
    """

    def predictions(x):
        found = outputs(x)
        return found.reshape(-1, found.shape[-1])

    @jax.jit
    def total(x, factors):
        found = predictions(x)
        jacobian = jax.jacfwd(predictions)(x).reshape(*found.shape, -1)
        weighted = factors[:, None, None] * jax.vmap(jax.hessian(loss))(found)
        return jnp.einsum("mcp,mcd,mdq->pq", jacobian, weighted, jacobian)

    count = outputs(x)[..., 0].size
    factors = np.full(count, 1 / count) if factors is None else np.ravel(factors)
    return float64(total(x, factors))


def quadratic(matrix, slope, x):
    return slope @ x + x @ matrix @ x / 2


def minimum_on_grid(matrix, slope, box, num_points=401):
    """The best of a grid over ``box``, a pair of intervals."""
    axes = [np.linspace(low, high, num_points) for low, high in box]
    x, y = np.meshgrid(*axes, indexing="ij")
    points = np.stack([x.ravel(), y.ravel()], -1)
    values = points @ slope + np.sum(points @ matrix * points, -1) / 2
    return points[np.argmin(values)], values.min()
