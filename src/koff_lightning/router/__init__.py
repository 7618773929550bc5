"""Which memory a text wants, told from the text alone: n-grams or an encoder, trained, calibrated and asked."""
