"""Running a training job: setup, steps, validation, checkpoints, metrics, resuming. Start with `fit`."""
