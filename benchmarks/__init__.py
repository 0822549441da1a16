"""Speed and memory of every formulation against the plain class loop, measured in turns on one machine."""
