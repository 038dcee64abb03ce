"""The operations in plain NumPy, written to be read: the judge of every other backend, in tests only."""
