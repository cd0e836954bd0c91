"""What algorithms are given, and what families of them share."""
