"""The last rewrites before an inner compiler: ways of computing that are faster, with the same results."""
