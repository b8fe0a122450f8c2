"""Budgets over runs: a SQL registry of data sets, budgets, runs, reservations and settlements. See ``README.md``."""
