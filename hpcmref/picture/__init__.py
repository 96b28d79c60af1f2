"""Image files and pixels: reading, writing and metadata. Knows nothing of models."""
