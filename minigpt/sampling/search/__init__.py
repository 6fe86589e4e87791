"""Beam search and its variants."""
