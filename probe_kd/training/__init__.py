"""A run: its phases and steps, what it remembers, how it is saved, and what is tried before it."""
