"""Who is measured: the engines' names, what a run must know of each, and how each is called."""
