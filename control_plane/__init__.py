"""The control plane: pools of Ray actors, the system they make up, and the `kvrelay` command line."""
