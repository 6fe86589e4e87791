"""The generation loop over a batch of rows."""
