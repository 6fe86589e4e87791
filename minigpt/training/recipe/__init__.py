"""What a step computes, on one process or many."""
