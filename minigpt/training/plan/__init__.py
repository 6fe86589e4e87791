"""Memory, time and hardware estimates of a training run."""
