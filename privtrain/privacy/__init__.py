"""The guarantee: plan, sampling, secret, noise."""
