"""Training with Lightning; no other package imports lightning or wandb."""
