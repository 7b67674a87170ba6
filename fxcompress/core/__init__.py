"""The nouns (site, cost, budget, plan) and the only code that captures, runs and edits graphs. Imports none above."""
