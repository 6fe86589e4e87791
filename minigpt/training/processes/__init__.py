"""Multi-process training: launching, joining and watching processes."""
