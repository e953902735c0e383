"""The hub: whether a model that is not on this machine can be asked for at all."""

from __future__ import annotations

_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one of which a model has
_SECONDS = 10.0  # to wait for a first answer; who waits longer is asked again by transformers
# Classes of errors of httpx, of requests and of the hub's offline mode, by name: which of the
# libraries is used depends on the version.
_NO_NETWORK = ("ConnectError", "ConnectionError", "ProxyError", "OfflineModeIsEnabled")


def check_reachable(source: str) -> None:
    """Check that a model's files are on this machine, or that the hub answers.

    Transformers would try again and again, for the model and then for its tokenizer, and end with
    the tokenizer that it did not find.

    Args:
        source: a hub id.

    Raises:
        ConnectionError: there is no network, or the hub can't be reached from here.
    """
    if is_cached(source):
        return
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # any other one is left to what loads the model
        if type(error).__name__ not in _NO_NETWORK:
            return
        raise ConnectionError(_unreachable(source, constants.ENDPOINT, error)) from None


def _unreachable(source: str, endpoint: str, error: Exception) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        reason = "the hub is not asked, since HF_HUB_OFFLINE is set: unset it"
    else:
        first = str(error).partition("\n")[0]
        reason = (
            f"the hub, {endpoint}, can't be reached ({first}). Download it on a machine that "
            f"reaches it, by hf download {source} --local-dir FOLDER, and copy the folder"
        )
    return f"{source} is not on this machine, and {reason}; or name a folder or GGUF file here"


def is_cached(source: str) -> bool:
    """Return whether the hub's files of a model are on this machine already.

    Raises:
        HFValidationError: `source` is a path, which no hub id can be.
    """
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(source, name), str) for name in _FILES)
