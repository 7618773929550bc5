"""Train a decomposition: the LightningModule, its optimizer, its strategies, its checkpoints."""
