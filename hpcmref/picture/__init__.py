"""Image files and pixels: reading, writing and metadata. Nothing here depends on models."""
