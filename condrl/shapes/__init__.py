"""The embedded pipeline's scenes and networks."""
