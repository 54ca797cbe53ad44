"""Files and folders on a disk: whole or absent, locked, and known by their digests."""
