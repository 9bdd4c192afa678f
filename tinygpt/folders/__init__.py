"""What is saved: models, adapters, runs."""
