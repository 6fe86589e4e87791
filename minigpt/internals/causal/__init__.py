"""Causal analyses: ablation, patching, paths, circuits, heads."""
