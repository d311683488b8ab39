"""Admits verbs, runs them and ends them; alone knows saves, loads and an engine's lifetime together."""
