"""The per-run contribution ledger."""

from privtrain.ledger.log import Ledger, LedgerState, StepEntry, open_ledger, read_records, verify

__all__ = ["Ledger", "LedgerState", "StepEntry", "open_ledger", "read_records", "verify"]
