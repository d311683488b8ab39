"""Pure: items to bytes of a file image, `.metadata` and manifest, and back; ours and stock's."""
