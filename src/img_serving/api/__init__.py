"""HTTP: translate and nothing else, one file per resource."""
