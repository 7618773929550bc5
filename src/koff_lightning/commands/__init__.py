"""The verbs of `koff` and what they share."""
