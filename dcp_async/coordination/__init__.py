"""Every rank sends, one decides, all hear: keyed messages on the process group's store, no collectives."""
