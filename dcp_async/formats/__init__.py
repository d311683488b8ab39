"""Formats: items <-> file images. Pure functions over bytes and numbers, no I/O."""
