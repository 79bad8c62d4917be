"""Checks and choices before Ray starts, so that a run that cannot work ends in seconds."""
