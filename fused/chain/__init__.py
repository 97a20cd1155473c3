"""Which modules form a chain, whether it may run as one operation now, and the Sequential that asks."""
