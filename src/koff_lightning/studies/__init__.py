"""Protocols over many runs or over one result: `claims` and `analysis`."""
