"""Starting, connecting and watching several training processes."""
