"""Beams of every kind."""
