"""The study in a federation: every strategy from the same base, beside gold, while training carries on."""
