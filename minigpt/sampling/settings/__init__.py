"""Settings of sampling: fields, their rules, conflicts and orders."""
