"""The data path of each back-end, one module a back-end."""
