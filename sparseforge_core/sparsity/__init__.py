"""The paper's mathematics: pure functions on tensors. Nothing here knows a model, a file or a table."""
