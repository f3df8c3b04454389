"""Passes that make of a captured graph the one that a plan asks for."""
