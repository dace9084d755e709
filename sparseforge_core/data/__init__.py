"""Text in, batches of token ids out. Batches are a pure function of (corpus, seed, step)."""
