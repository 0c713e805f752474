"""How the processes of a run are arranged."""
