import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import problems
from optax_cgfac import KroneckerOperator
from optax_cgfac.solve.choose import SolveSpec, make_plan
from optax_cgfac.solve.solver import solve_layers

DAMPING = 0.1
TO_CONVERGENCE = {"max_steps": 300, "rtol": 1e-13}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lu"}, "solver .*'cg', 'cholesky', .*got 'lu'"),
        ({"structure": "full", "solver": "eigendecomposition"}, "has no factors"),
        ({"rtol": 1.0}, r"rtol .*\[0, 1\), got 1\.0"),
        (
            {"solver": "cholesky", "damping_form": "factored", "space": "parameter"},
            "space must be left out where no conjugate gradients run",
        ),
        ({"damping_form": "factored", "max_steps": 5}, "max_steps must be left out"),
        ({"solver": "eigendecomposition", "warm_start": True}, "warm_start must be"),
        ({"structure": "block", "solver": "cholesky", "space": "sample"}, "space must"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SolveSpec(**options)


@pytest.mark.parametrize("num_rows", [8, 64, 1000])
@pytest.mark.parametrize("sizes", [(1000, 1000), (30, 10), (784, 1000)])
def test_the_cheaper_space_is_chosen(sizes, num_rows):
    costs = {
        space: make_plan(SolveSpec(space=space), num_rows, *sizes).flops
        for space in ("sample", "parameter")
    }
    plan = make_plan(SolveSpec(), num_rows, *sizes)
    assert plan.space == min(costs, key=costs.get)
    assert plan.flops == min(costs.values())


@pytest.mark.parametrize("num_rows", [8, 1000])
def test_a_factored_system_is_solved_side_by_side(num_rows):
    plan = make_plan(SolveSpec(damping_form="factored"), num_rows, 60, 40)
    assert (plan.space, plan.solver) == ("sample", "cholesky")


SOLVES = {
    "tikhonov, auto": {},
    "tikhonov, parameter": {"space": "parameter"},
    "tikhonov, sample": {"space": "sample"},
    "tikhonov, eigendecomposition": {"solver": "eigendecomposition"},
    "factored, auto": {"damping_form": "factored"},
    "factored, parameter": {"damping_form": "factored", "space": "parameter"},
    "factored, sample, cg": {"damping_form": "factored", "solver": "cg"},
    "factored, eigendecomposition": {
        "damping_form": "factored",
        "solver": "eigendecomposition",
    },
}


@pytest.mark.parametrize("name", SOLVES)
def test_every_solve_of_plain_and_stacked_layers_equals_the_dense_one(name, x64):
    # What coefficients of rows can attain: see the top of sample_space.py.
    on_coefficients = name in ("tikhonov, auto", "tikhonov, sample")
    limits = {"max_steps": 400, "rtol": 1e-7} if on_coefficients else TO_CONVERGENCE
    is_iterative = SolveSpec(**SOLVES[name]).is_iterative
    spec = SolveSpec(**SOLVES[name], **(limits if is_iterative else {}))
    single = problems.layer_problem(4, 6, 5)
    layers = [problems.layer_problem(9, 4, 3, bias=True, seed=i) for i in range(2)]
    stacked = problems.stack_problems(layers)
    operators = [
        KroneckerOperator(p.a, p.g, 1 / n, 1 / n)
        for p, n in ((single, 4), (stacked, 9))
    ]
    solve = jax.jit(lambda *args: solve_layers(spec, *args))
    (x, info), (xs, infos) = solve(
        operators, DAMPING, [single.b, stacked.b], [single.x0, stacked.x0]
    )
    form = oracles.DAMPED[spec.damping_form]
    for problem, solution in zip([single, *layers], [x, *xs], strict=True):
        dense = form(problem.a, problem.g, DAMPING)
        expected = oracles.solve(dense, problem.b)
        error = oracles.relative_error(solution, expected)
        assert error < (1e-6 if on_coefficients else 1e-9)
    assert info.converged
    assert np.all(infos.converged)
    steps = np.array([info.num_steps, *np.ravel(infos.num_steps)])
    assert np.all((steps > 0) == spec.is_iterative)


def test_solves_stay_in_single_precision_beside_a_double_precision_damping(x64):
    problem = problems.layer_problem(4, 6, 5, dtype="float32")
    operator = KroneckerOperator(problem.a, problem.g, 0.25, 0.25)
    solve = jax.jit(solve_layers, static_argnums=0)
    for name in ("tikhonov, sample", "tikhonov, parameter", "factored, auto"):
        spec = SolveSpec(**SOLVES[name])
        [(x, info)] = solve(spec, [operator], jnp.float64(0.1), [problem.b], [None])
        assert x.dtype == jnp.float32
        assert info.residual_norm.dtype == jnp.float32
