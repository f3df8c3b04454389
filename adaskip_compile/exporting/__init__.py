"""Specialised graphs as files that run without this package."""
