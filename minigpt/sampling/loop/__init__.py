"""Rows that are written together."""
