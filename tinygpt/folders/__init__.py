"""Folders of models, adapters and runs."""
