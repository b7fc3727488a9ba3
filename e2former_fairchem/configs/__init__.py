"""Config groups `backbone/` and `heads/`: the plugin puts this package on the search path of every fairchem YAML."""
