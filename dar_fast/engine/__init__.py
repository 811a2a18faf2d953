"""The engine: many requests, one machine, no picture changed by its neighbours."""
