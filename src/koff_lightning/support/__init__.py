"""What every room needs and no method is in: errors, files, ranks, names, secrets, wording."""
