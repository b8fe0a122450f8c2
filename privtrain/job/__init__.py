"""The life of a run: claim, session, resume, checkpoint, stop, release."""
