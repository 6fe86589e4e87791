"""Directions in activations."""
