"""Ranks chosen for a model: which Walsh functions each layer keeps, under a budget."""

from lbpwht_jax.plan.planning import cross_entropy, parse_budget, plan

__all__ = ["cross_entropy", "parse_budget", "plan"]
