"""What is minimised: losses with their Hessians, the objective, batches of examples.

Imports `utils` only. Start with `loss`.
"""
