"""From specialised graphs to what runs."""
