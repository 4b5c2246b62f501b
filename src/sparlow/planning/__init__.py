"""What a run will keep, take and need, before it starts."""
