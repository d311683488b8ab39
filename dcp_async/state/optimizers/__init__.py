"""Optimizers: their states by canonical names, saved, and given back exactly."""
