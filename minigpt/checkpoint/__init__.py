"""A checkpoint: a folder written so that it survives and read so that nothing runs. Runs, formats, other layouts."""
