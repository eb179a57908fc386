"""Several runs beside each other on one page: what was set otherwise, and what came of it."""
