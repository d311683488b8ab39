"""How a sample is taken: states, processes, clocks and the machine they run on."""
