"""The figures of a run: results.json, tables, plots."""
