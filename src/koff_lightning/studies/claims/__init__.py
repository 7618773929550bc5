"""`koff claims`: KOFF and its controls, trained alike, and what they say of the claims."""
