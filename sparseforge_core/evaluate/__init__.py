"""Measuring a finished model: suites, perplexity, zero-shot accuracy through lm-eval, throughput."""
