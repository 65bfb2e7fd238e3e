"""The paper's study, on pooled data; it needs neither Flower nor Ray."""
