"""What a decomposition is worth: one-shot baselines, lm-eval, the claims report."""
