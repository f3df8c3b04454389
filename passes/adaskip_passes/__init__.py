"""Analyses and passes over captured graphs: they find the sublayers of a decoder, and probe, skip and rewrite them.

They know nothing of the driver, ``adaskip_compile``, which captures the graphs and runs them.
"""
