"""Reading and writing files: weights, the hub, JSON."""
