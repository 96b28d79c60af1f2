"""The bytes of a file: the container and the range coder. This package does not use images, models or torch."""
