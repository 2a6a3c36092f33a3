"""Pictures and probes of a run."""
