"""The YAML file: its tree, its keys, its meaning, its schema, and one to begin with."""
