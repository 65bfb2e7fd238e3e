"""What bad replies and dishonest clients do to a federation: `python -m benchmarks.reliability`."""
