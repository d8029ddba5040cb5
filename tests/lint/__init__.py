"""Checks of the installed SQL."""
