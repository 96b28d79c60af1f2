"""The bytes of a file: the container and the range coder. Knows nothing of images and models, and needs no torch."""
