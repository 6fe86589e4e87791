"""What every analysis needs of a model under study: texts, activations and their names, edits, results."""
