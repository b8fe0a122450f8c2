"""Files and directories: atomic writes, guarded reads, private places."""
