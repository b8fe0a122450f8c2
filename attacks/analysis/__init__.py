"""Every attack and statistic, from the signals alone."""
