"""What keeps a run alive and recorded: its folder, checkpoints, metrics, and the guard of its steps."""
