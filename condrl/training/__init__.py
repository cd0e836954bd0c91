"""A run: built, checked, tried, tuned, measured, recorded and resumed."""
