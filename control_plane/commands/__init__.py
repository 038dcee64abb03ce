"""The commands of `kvrelay`, one a file; what they need is imported when they run, so that `--help` is quick."""
