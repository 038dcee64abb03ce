"""The commands of `kvrelay`; what is heavy is imported when they run, so that `--help` is quick."""
