"""The HTML report about one text."""
