"""Studies: grids of training and attack jobs, started as processes, and one report that compares them with a paper.

A *cell* is one combination of the grid's axis values and a seed: a configuration and the commands to run with it. A
*job* is what runs for one or more cells whose configurations are equal.
"""
