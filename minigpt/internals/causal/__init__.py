"""Causal analyses: ablation, patching, circuits. They measure what an intervention does to the output."""
