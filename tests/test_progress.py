import logging

from flowdata._common import notices, progress
from flowdata._common.notices import say
from flowdata._common.progress import progress_bar


def test_a_log_gets_a_line_in_a_while_and_one_at_the_end(capsys, monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 4.0, 30.0, 40.0, 40.0, 50.0, 60.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    with progress_bar(2000, "scoring", "samples", initial=1000) as advance:
        advance(20)  # at 2 seconds: too early for a line
        advance(20)  # at 4: the first line, which says how long it takes
        advance(260)  # at 30: too early
        advance(300)  # at 40
        advance(400)  # at 50: too early again
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1,040 of 2,000 samples (52%), 10/s, 2 min left",
        "scoring: 1,600 of 2,000 samples (80%), 15/s, 26 s left",
        "scoring: 2,000 of 2,000 samples (100%), 17/s",
    ]


def test_no_time_is_told_before_enough_is_done_and_the_first_advance_is_not_counted(
    capsys, monkeypatch
):
    clock = iter([0.0, 10.0, 10.0, 11.0, 14.0, 14.0, 20.0, 45.0, 45.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    with progress_bar(2500, "scoring", "samples") as advance:
        advance(16)  # at 10 seconds: most of them for what comes once
        advance(16)  # at 11: too early for a line
        advance(48)  # at 14: the third advance
        advance(100)  # at 20: time was told, so that the next line has time
        advance(2320)  # at 45
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 16 of 2,500 samples (1%)",
        "scoring: 80 of 2,500 samples (3%), 16/s, 3 min left",
        "scoring: 2,500 of 2,500 samples (100%), 71/s",
    ]
    clock = iter([0.0, 10.0, 10.0, 15.0, 15.0, 16.0, 17.0])
    with progress_bar(4, "checking", "samples") as advance:
        advance(1)
        advance(1)
        advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "checking: 1 of 4 samples (25%)",
        "checking: 2 of 4 samples (50%), 0.2/s, 10 s left",
        "checking: 4 of 4 samples (100%), 0.43/s",
    ]


def test_a_line_at_the_very_end_is_the_last_one(capsys, monkeypatch):
    monkeypatch.setattr(progress, "monotonic", iter([0.0, 4.0, 4.0]).__next__)
    with progress_bar(40, "scoring", "samples") as advance:
        advance(40)
    assert capsys.readouterr().err == "scoring: 40 of 40 samples (100%), 10/s\n"


def test_patience_shows_work_that_lasts_and_none_that_does_not(capsys, monkeypatch):
    for seconds, lines in ((2.0, 0), (4.0, 1)):
        monkeypatch.setattr(progress, "monotonic", iter([0.0, seconds, seconds]).__next__)
        with progress_bar(40, "probe", "samples", patient=True) as advance:
            advance(40)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_nothing_is_shown_where_nothing_is_asked_for(capsys):
    with progress_bar(2, "scoring", "samples", shown=False) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_notice_is_logged_and_printed_only_where_no_logging_is_set_up(
    capsys, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    say("a sentence")
    say("a whisper", shown=False)
    assert [record.getMessage() for record in caplog.records] == ["a sentence"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(notices, "_has_logging", lambda: False)
    say("a sentence")
    say("a whisper", shown=False)
    assert capsys.readouterr().err == "flowdata: a sentence\n"
