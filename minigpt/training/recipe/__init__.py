"""What a training step computes, on one process or several."""
