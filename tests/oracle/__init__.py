"""A split ring in plain Python, and the compiled one held against it."""
