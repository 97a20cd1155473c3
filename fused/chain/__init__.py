"""Which modules form a chain and whether it may run as one operation; `Sequential`, `fuse_`."""
