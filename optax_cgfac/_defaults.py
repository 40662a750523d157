"""What `fisher_estimator` does where its user does not say."""

# Models of at most so many outputs need half the eigenpairs, and rows and quadratic
# models half as often (benchmarks/LOG.md, 10 and 17).
FEW_OUTPUTS = 32


def default_rank(num_examples: int, few_outputs: bool) -> int:
    """Eigenpairs whose products are a part of a gradient of so many examples.

    Every example adds as many directions to the curvature as there are outputs:
    classifiers of few classes need less (benchmarks/LOG.md).

    Returns:
      Their number.
    """
    share = 8 if few_outputs else 4
    return max(16, min(num_examples // share, 64))


def default_capture_every(captured: int, num_examples: int, few_outputs: bool) -> int:
    """Updates between captures such that they cost about a sixteenth of the gradient.

    A 32nd part of it where the outputs are few.
    Batches of less than 64 examples are not worth it: their steps take the time that
    it takes to start them.

    Returns:
      Their number.
    """
    if num_examples < 64:
        return 1
    return min(-(-(32 if few_outputs else 16) * captured // num_examples), 8)
