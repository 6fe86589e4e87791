"""Decoding: processors (logits -> logits), choice (logits -> ids), stopping, the loop and its front door."""
