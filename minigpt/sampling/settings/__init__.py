"""Settings of sampling: fields, rules, conflicts, orders."""
