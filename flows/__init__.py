"""What to run, and where: grids, the cycle that executes them, Prefect flows, the command line."""
