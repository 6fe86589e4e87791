"""What a logit is made of, and who wrote it."""
