"""Sparse autoencoders: they are read from files or trained, inspected, and used as readouts of latents."""
