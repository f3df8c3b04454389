"""What a model costs: by arithmetic, and by the clock."""
