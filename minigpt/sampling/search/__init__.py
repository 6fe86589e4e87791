"""Beam search: standard, sampled, stochastic, diverse and constrained."""
