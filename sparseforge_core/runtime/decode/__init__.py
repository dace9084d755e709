"""Decoding with a static cache: one step is one CUDA graph of few kernels, dense or sparse alike."""
