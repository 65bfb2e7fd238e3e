"""Train, watch, forget and audit from Python: what `fedunlearn.run` and `fedunlearn.open_run` give."""
