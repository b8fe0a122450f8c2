"""The process that a command runs in: exit codes, console, launchers, groups of ranks."""
