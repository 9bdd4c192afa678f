"""In-context learning: what a model does by its prompt alone. No weight changes."""
