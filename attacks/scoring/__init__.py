"""The job with the models: per-token signals of every planned document."""
