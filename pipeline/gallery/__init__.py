"""Pictures that show what a network does: `ldm gallery`."""
