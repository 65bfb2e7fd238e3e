"""A local page to watch runs and to ask them: `fedunlearn serve`."""
