"""A directory of a local or mounted file system as a storage."""
