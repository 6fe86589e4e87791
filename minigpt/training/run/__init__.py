"""A run's life, told by fit."""
