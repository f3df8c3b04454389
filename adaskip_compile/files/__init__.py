"""Files: versioned, written whole, and of which model they are."""
