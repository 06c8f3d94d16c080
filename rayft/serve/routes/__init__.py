"""One file per group of routes; each has a function `router` that takes what its routes work with."""
