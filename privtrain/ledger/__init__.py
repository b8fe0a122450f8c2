"""The per-run contribution ledger."""

from privtrain.ledger.bodies import charged_units
from privtrain.ledger.chain import LedgerState, StepEntry, read_records
from privtrain.ledger.log import Ledger, open_ledger, verify, verify_chain

__all__ = [
    "Ledger",
    "LedgerState",
    "StepEntry",
    "charged_units",
    "open_ledger",
    "read_records",
    "verify",
    "verify_chain",
]
