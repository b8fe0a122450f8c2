"""Record membership attacks, one a file. Each is lifted to users by the analysis."""
