"""What is minimised: losses with known Hessians, the objective, batches of examples.

Imports `utils`. Start with `loss`.
"""
