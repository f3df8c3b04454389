"""The caches that requests fill: who they belong to, and the memory that they take."""
