"""Which checkpoints exist and are whole, what an opened one holds, which may go."""
