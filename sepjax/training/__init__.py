"""Loss, optimizer, train state and train step."""
