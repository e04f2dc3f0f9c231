"""Pallas: interpreted, compiled for chips that are not there, and on a chip."""
