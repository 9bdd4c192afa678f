"""Text becomes numbers, and numbers become text."""
