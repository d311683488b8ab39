"""What checkpoints cost: ours, stock DCP's, every peer's and the bare machine's, measured in one run."""
