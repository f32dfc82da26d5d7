"""Progress: the newest complete line of a log, in place on a terminal, as plain lines elsewhere."""

import io
import logging

from snakemake_executor_plugin_submitit.progress import Progress, newest_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_complete_lines_count(tmp_path):
    log = tmp_path / "base.log"
    log.write_text("base  step 1/9\rbase  step 2/9\rbase  st")
    assert newest_line(str(log)) == "base  step 2/9"
    log.write_text("one\n\n")
    assert newest_line(str(log)) == "one"
    assert newest_line(None) is None
    assert newest_line(str(log), since=log.stat().st_mtime + 1) is None  # an earlier attempt's


def test_plain_lines_come_once_and_with_their_rule(tmp_path):
    log = tmp_path / "log"
    stream = io.StringIO()
    progress = Progress(stream=stream)
    log.write_text("step 1\n")
    for _ in range(3):
        progress.show([("base", str(log), None, 0.0), ("tokens", None, "waiting: Resources", 0.0)])
    log.write_text("step 2\n")
    progress.show([("base", str(log), None, 0.0)])  # too soon after the first
    assert stream.getvalue() == "base  step 1\ntokens  waiting: Resources\n"


def test_a_status_line_is_out_of_the_way_of_messages(tmp_path):
    log = tmp_path / "log"
    log.write_text("base  step 1\n")
    stream = Terminal()
    logger = logging.getLogger("progress-test")
    logger.addHandler(logging.StreamHandler(stream))
    progress = Progress(stream=stream)
    progress.install(logger)
    progress.show([("base", str(log), None, 0.0)])
    logger.error("something happened")
    assert stream.getvalue() == "\r\x1b[Kbase  step 1\r\x1b[Ksomething happened\n"


def test_an_output_that_takes_nothing_more_ends_the_progress_and_not_the_run(tmp_path):
    """A disk that is full for a moment, or a terminal that is gone."""

    class Full(Terminal):
        def write(self, text):
            raise OSError(28, "No space left on device")

    for terminal in (True, False):
        stream = Full()
        stream.isatty = lambda terminal=terminal: terminal
        progress = Progress(stream=stream)
        progress.show([("base", None, "waiting: Resources", 0.0)])
        progress.clear()
        assert not progress.enabled
