"""Evaluation: loss, perplexity and bits per byte of a model on held-out text."""
