"""Files: written so that a kill does not damage them, and read as from an unknown author."""
