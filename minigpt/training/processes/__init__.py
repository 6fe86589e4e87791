"""Several processes as one run: launch, join, watch."""
