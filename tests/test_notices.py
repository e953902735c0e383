from flowdata._common.notices import Once, logger


def test_a_sentence_is_said_once_whatever_its_numbers(caplog):
    once = Once()
    for number in range(3):
        with once:
            logger.warning("sample %d is odd", number)
            logger.warning("another thing")
    logger.warning("sample 7 is odd")  # outside, it counts as before
    assert caplog.messages == ["sample 0 is odd", "another thing", "sample 7 is odd"]
