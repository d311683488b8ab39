"""Every unpickler of the package, and what it may call; imports nothing of ours."""
