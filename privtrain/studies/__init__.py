"""Studies: grids of training and attack jobs, started as processes, and one report that compares them with a paper."""
