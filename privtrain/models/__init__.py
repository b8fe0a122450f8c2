"""Base models: loading, losses, what is trained, what it needs."""
