"""What came of a run: measured, compared with others, reported, exported."""
