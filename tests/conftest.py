"""What all tests need of the process they run in."""

import signal

# A shell starts background jobs with SIGINT ignored, and whatever they start inherits that: Ctrl-C, which the
# tests send to real processes, would do nothing there.
signal.signal(signal.SIGINT, signal.default_int_handler)
