"""Data: rows to users, sealed splits, tokens, microbatches."""
