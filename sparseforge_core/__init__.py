"""SparseForge: soft-mask annealing to exact N:M sparsity, and every rival under the same harness.

Importing this package imports nothing else, so that `analysis` and the command line never pay for torch.
"""

__version__ = "0.1.0"
