"""Decoding: processors (logits -> logits), choice (logits -> ids), stopping, the generation loop, the Sampler."""
