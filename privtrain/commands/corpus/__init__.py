"""``privtrain generate``: a corpus sampled from a released model, and what its owner measures of it."""
