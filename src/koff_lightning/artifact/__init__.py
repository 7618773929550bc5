"""The decomposed model on disk and in use: export, proof, load, swap, extend."""
