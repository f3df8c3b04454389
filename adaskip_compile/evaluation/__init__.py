"""Measures of what skipping costs in quality: one file a measure.

Every measure runs whatever a model runs when it is called, so a model that was compiled with a plan is measured as
its user gets it, and returns one value an item, so that the spread can be given.
"""
