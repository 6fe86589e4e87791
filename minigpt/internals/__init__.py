"""Studying a trained model: every activation seen, changed, traced to its sources; `Study` is the door."""
