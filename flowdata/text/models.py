"""Models and tokenizers that the command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowdata.text.read import first_line


def hide_progress() -> None:
    """Let models load without transformers' own progress bars."""
    _transformers().utils.logging.disable_progress_bar()


def load_model(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the causal language model at a hub id, a folder, or a GGUF file or folder."""
    transformers = _transformers()
    folder, options = _gguf(source)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, **options
    )


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer at a hub id, a folder, or a GGUF file or folder.

    Raises:
        ValueError: there is none.
    """
    transformers = _transformers()
    folder, options = _gguf(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {source} ({first_line(error)}); "
            "name one with --tokenizer"
        ) from None


def _gguf(source: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and the GGUF file in it if that is all there is."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) > 1:
            raise ValueError(f"{source} holds several GGUF files; name one: {', '.join(found)}")
        if found:
            return source, {"gguf_file": found[0]}
        raise ValueError(f"{source} holds neither a config.json nor a GGUF file: it is no model")
    return source, {}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError('this needs transformers: pip install "flowdata[transformers]"') from None
    return transformers
