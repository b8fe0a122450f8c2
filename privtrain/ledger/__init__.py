"""The per-run contribution ledger: a hash-chained record of who contributed to which step."""
