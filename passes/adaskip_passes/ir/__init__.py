"""What a graph is made of, and how it is read and written."""
