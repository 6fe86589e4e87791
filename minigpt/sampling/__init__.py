"""Text generation: logits processors, token choice, stopping criteria, the generation loop and the Sampler API."""
