"""Record membership attacks, one a file. The analysis averages each over a user's documents, too."""
