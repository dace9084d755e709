"""Where the weights are: model sources, loading, and the sites that one family of architectures declares."""
