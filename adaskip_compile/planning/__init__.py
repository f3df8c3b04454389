"""What to skip: by similarity, by a goal, or within a loss."""
