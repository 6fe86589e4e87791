"""Computation of a training step: loss, optimizer, schedule, weight averaging, parallelism."""
