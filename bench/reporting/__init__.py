"""What samples say: medians, ratios, tables and charts, from a run's JSON alone."""
