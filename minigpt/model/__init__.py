"""The Transformer: configuration, layers, attention, key/value cache, GPT. No text, files or training here."""
