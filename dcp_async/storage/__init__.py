"""Storages: bytes and media. They know nothing of tensors."""
