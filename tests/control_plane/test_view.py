"""What is shown while a system starts."""

import io

from control_plane.commands.view import StartView


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It does."""
        return True


def test_a_file_gets_a_line_for_each_phase() -> None:
    stream = io.StringIO()
    with StartView(stream=stream) as view:
        for percent in (0, 50, 100):
            view.tell("prefill-0", f"packing weights {percent}%")
        view.tell("prefill-0", "ready")
        view.progress("fetching", 1, 4)
        view.progress("fetching", 4, 4)
    assert stream.getvalue() == "prefill-0: packing weights\nprefill-0: ready\nmodel: fetching\n"


def test_a_terminal_gets_bars_that_go_away() -> None:
    stream = Terminal()
    with StartView(stream=stream) as view:
        view.tell("prefill-0", "packing weights 50%")
        view.tell("decode-0", "starting")
        view.tell("prefill-0", "ready")
    shown = stream.getvalue()
    assert "prefill-0" in shown
    assert "decode-0" in shown
    # The last thing is that the lines are erased and the cursor shown again.
    assert shown.rstrip().endswith("\x1b[2K")


def test_quiet_is_quiet() -> None:
    stream = io.StringIO()
    with StartView(quiet=True, stream=stream) as view:
        view.tell("prefill-0", "ready")
    assert stream.getvalue() == ""
