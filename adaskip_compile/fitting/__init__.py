"""What is learned by running: replacements, one by one, in sequence and together, and the order to skip in."""
