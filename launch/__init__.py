"""The door of the project: one `ldm` command, and how its jobs are started."""
