"""The loop thread, threads for blocking calls, bounded pipes, and verbs as generators."""
