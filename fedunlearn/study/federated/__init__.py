"""The study in a federation: every strategy from the same base, beside the retrained model, while training goes on."""
