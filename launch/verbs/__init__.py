"""The verbs of the `ldm` command, by what they are about; each imports what it needs inside its function."""
