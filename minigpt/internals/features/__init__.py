"""Directions in activations: neurons, probes, steering, autoencoders."""
