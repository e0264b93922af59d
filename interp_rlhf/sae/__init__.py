"""Sparse autoencoders: read from the files that people have, trained, understood, and handed out as latents to read."""
