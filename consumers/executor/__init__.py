"""Requests to results: admit, schedule, claim, execute, store, finish."""
