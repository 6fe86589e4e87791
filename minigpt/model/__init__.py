"""The Transformer: configuration, layers, attention, key/value cache and GPT. It knows nothing of text, files or training."""
