"""Averages of the weights: sharded with the masters, kept as snapshots, rebuilt afterwards."""
