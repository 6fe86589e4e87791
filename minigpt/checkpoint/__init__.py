"""Checkpoints: saving, loading, verification, pruning, and Hugging Face's formats."""
