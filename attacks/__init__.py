"""Post-training attack job: reads a finished run directory, never trains."""
