"""Estimate what a run will cost."""
