"""Training with Lightning; the only package that imports lightning or wandb."""
