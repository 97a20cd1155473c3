"""Rules and tables: which tile a kernel takes."""
