"""Graphs of a model: captured by Dynamo, and kept for the next process."""
