"""The paper's study, on pooled data."""
