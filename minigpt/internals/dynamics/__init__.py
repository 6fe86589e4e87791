"""Changes over the context, over training, and between models."""
