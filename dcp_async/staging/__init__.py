"""From live tensors to leased slots of host memory; owns the pool, the copying thread and the devices."""
