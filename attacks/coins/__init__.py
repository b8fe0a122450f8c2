"""Before training: every coin of the later attack, flipped and sealed; after it, checked."""
