"""The embedded demo: the whole story on a 135M chat model, on a CPU."""
