"""Execution of a training run; the entry point is fit.py."""
