"""The verbs of `mole library`, one per file."""
