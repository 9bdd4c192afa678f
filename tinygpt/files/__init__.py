"""Files that survive a kill, and that anybody may have written."""
