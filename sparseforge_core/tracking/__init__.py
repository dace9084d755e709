"""What a run tells the outside: a journal file first, and its mirror in MLflow."""
