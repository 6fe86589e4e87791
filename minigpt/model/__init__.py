"""The Transformer: configuration, layers, attention, cache, GPT. It knows nothing of text, files or training."""
