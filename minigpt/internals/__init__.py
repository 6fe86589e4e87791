"""Interpretability of trained models: read, edit and attribute activations. The entry point is `Study`."""
