"""How a model came about: over its context, over its training, between models."""
