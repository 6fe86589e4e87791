"""Shared by all analyses: texts, activations and their names, edits, results."""
