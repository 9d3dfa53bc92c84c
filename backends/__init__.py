"""Storage backends: one module each, found through the registry."""
