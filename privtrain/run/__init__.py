"""One run's directory, its statement and its release."""
