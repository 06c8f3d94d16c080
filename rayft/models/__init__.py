"""Base weights: where they come from, how they are loaded, which of them are trained, how they are saved."""
