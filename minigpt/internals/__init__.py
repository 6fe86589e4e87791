"""Study a trained model: read, edit and trace activations. `Study` is the entry point."""
