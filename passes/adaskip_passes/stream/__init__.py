"""The residual stream of a decoder, found in its graph."""
