"""What every analysis needs: tokenization, activations and their names, hooks, results."""
