"""One page per run, or for several: is the model better, what did that cost, and what do the pictures look like?"""
