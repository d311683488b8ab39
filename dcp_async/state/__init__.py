"""A trainer's objects as flat lists of tensors and leaves, and back; calls user code, does no I/O."""
