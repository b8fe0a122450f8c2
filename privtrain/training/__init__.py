"""Training: the loop, its start-up checks, resumption, and the job around it."""
