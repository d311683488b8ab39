"""Pure: from captured structures to who writes what, where every byte lies and what is published."""
