"""conf/ + overrides → a frozen dataclass; what is wrong with it, in words; what a run keeps of it."""
