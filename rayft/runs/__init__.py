"""Run folders, storage and references to runs."""
