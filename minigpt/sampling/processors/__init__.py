"""Logits -> logits, one family per file."""
