"""Smaller models: `quantisation` of weights, the files they are `stored` in, and `pruning`."""
