"""The Transformer: config, layers, attention, cache, GPT. Independent of text, files and training."""
