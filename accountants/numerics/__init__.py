"""What the accountants compute with."""
