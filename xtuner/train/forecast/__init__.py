"""`xtuner plan`: memory and speed of a config on GPUs that need not be here, by the plan that would train."""
