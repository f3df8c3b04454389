"""What runs passes, verifies what they made, and runs them again."""
