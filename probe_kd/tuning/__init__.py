"""Tuning: short runs of a recipe with other values, and whether the best of them beats the recipe as it stands."""
