import subprocess
import sys

from flowdata._common.notices import Once, logger


def test_a_sentence_is_said_once_whatever_its_numbers(caplog):
    once = Once()
    for number in range(3):
        with once:
            logger.warning("sample %d is odd", number)
            logger.warning("another thing")
    logger.warning("sample 7 is odd")  # outside, it counts as before
    assert caplog.messages == ["sample 0 is odd", "another thing", "sample 7 is odd"]


TELLS = """
import importlib, logging, sys
from flowdata._common import notices
log = logging.getLogger("flowdata")
for setup in sys.argv[1:]:
    exec(setup)
    notices.say("a notice")
    log.warning("a warning of %d samples", 3)
    notices.warn_once("a warning once", about=setup)
    print("---", file=sys.stderr)
    log.handlers[1:], logging.root.handlers[:], log.propagate = [], [], True
    log.setLevel(logging.NOTSET)
"""
BOTH = ["flowdata: a notice", "flowdata: a warning of 3 samples", "flowdata: a warning once"]
LOGGED = ["WARNING:flowdata:a warning of 3 samples", "WARNING:flowdata:a warning once"]
SETUPS = {
    "pass": BOTH,
    "importlib.reload(notices)": BOTH,
    "log.setLevel(logging.DEBUG)": BOTH,
    "logging.getLogger('other').addHandler(logging.StreamHandler())": BOTH,
    "logging.basicConfig(); log.propagate = False": BOTH,
    "logging.basicConfig()": LOGGED,
    "logging.basicConfig(level=logging.INFO, force=True)": ["INFO:flowdata:a notice", *LOGGED],
    "log.addHandler(logging.NullHandler())": [],
}


def test_warnings_and_notices_say_whose_they_are_once():
    """A terminal without logging has a prefix on both; a log that the user set up tells itself."""
    command = [sys.executable, "-c", TELLS, *SETUPS]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [part.split("\n")[:-1] for part in run.stderr.split("---\n")[:-1]]
    assert dict(zip(SETUPS, told, strict=True)) == SETUPS
    assert run.stdout == ""
