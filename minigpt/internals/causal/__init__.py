"""What changes when something is changed."""
