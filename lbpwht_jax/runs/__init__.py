"""Runs: what one is, its folder, how it trains, and what it came to."""
