"""How fast and how large: every formulation against the plain class loop, measured in turns on one machine."""
