"""What only an accelerator can show; ``make gpu`` runs it."""
