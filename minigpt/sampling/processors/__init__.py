"""Logits -> logits, one family a file."""
