"""The recipe: its fields, how it is read, and what it becomes on this machine."""
