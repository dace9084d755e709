"""Statistics that a criterion may need, observed while the model runs."""
