"""Estimate the memory and time of a run."""
