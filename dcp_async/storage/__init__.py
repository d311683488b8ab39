"""Bytes to media, by the protocols of base.py; knows no tensor, no pickle and no format."""
