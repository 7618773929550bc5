"""What the verbs share in reading their options."""
