"""Rewrites of a captured graph before anything is specialised."""
