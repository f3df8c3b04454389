"""Models from where people have them."""
