"""The computation of a training step, on one or several processes: loss, optimizer, schedule, sharding."""
