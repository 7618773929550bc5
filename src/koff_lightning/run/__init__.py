"""What a run leaves behind: its folder, checkpoints, results and pictures."""
