"""What a logit is made of: decomposition, attribution, lenses, saliency."""
