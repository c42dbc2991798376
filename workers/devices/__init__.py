"""Devices whose requests are served in Python: `api.py` says what one is, the others are those that come with us."""
