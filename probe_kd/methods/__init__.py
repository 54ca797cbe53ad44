"""How a student learns from a teacher: losses, adapters, objectives, sharing, the step."""
