"""A file for each section of a recipe: functions from what is known to a value, and to what is wrong."""
