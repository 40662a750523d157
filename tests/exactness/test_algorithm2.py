import oracles
import problems
from optax_cgfac import KroneckerOperator


def test_with_one_example_the_operator_is_the_product_of_algorithm_2(dtype):
    problem = problems.layer_problem(1, 5, 3, bias=True, dtype=dtype)
    product = KroneckerOperator(problem.a, problem.g).matvec(problem.b)
    expected = oracles.algorithm2_product(problem.a[0], problem.g[0], problem.b)
    assert product.dtype == dtype
    assert oracles.relative_error(product, expected) < oracles.tolerance(dtype)
