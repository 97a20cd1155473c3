"""A Linear and what follows it in one kernel."""
