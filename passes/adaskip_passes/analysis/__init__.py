"""Analyses of captured graphs: what a pass needs to know, and never changes."""
