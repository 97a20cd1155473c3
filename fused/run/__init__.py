"""How a chain runs: prepared once, routed once, differentiated by one Function a family."""
