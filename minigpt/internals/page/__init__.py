"""One page about one text."""
