"""The per-run contribution ledger."""

from privtrain.ledger.chain import LedgerState, StepEntry, read_records
from privtrain.ledger.log import Ledger, open_ledger, verify, verify_chain

__all__ = ["Ledger", "LedgerState", "StepEntry", "open_ledger", "read_records", "verify", "verify_chain"]
