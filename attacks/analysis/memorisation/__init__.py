"""Memorisation: what a model gives back of what it was trained on. Each evaluation is a panel of the report."""
