"""What rewards share, and how they are scored."""
