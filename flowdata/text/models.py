"""Models and tokenizers by name: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from flowdata._common.excerpts import first_line
from flowdata.text.files.places import is_local, nothing_at
from flowdata.text.hub import check_reachable, is_cached
from flowdata.text.loaded import check_adapters, check_base, check_weights, explained_loading

_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")  # endings of files, not of hub ids


def hide_progress() -> None:
    """Let models load and data be read without the progress bars of other libraries."""
    import datasets

    load_transformers().utils.logging.disable_progress_bar()  # and those of the hub
    datasets.disable_progress_bars()


def load_model(source: str, *, trust_remote_code: bool = False, device: str | None = None) -> Any:
    """Return the causal language model at a hub id, a folder, or a GGUF file or folder.

    Args:
        source: the hub id or path.
        trust_remote_code: whether code that comes with the model is run.
        device: where the model is to be; None is where it loads.

    Raises:
        FileNotFoundError: `source` names something on this machine that is not there.
        ConnectionError: it has to come from the hub, which can't be reached.
        ImportError: transformers is not installed.
        ValueError: the folder `source` holds no model or several GGUF files; its file is damaged,
            or lacks weights of the model that its config.json describes.
    """
    transformers = load_transformers()
    folder, options = _place_of(source)
    if is_adapter(source):
        check_base(source, check_model)
    with explained_loading(source):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    check_weights(source, found["missing_keys"], found["unexpected_keys"])
    _forget_quantisation(model)
    return model if device is None else model.to(device)


def _forget_quantisation(model: Any) -> None:
    """Let a model whose file was quantised, and whose weights are plain now, be what it is.

    transformers would refuse to cast, train and save a model that it has read from a GGUF file.
    """
    method = getattr(model, "quantization_method", None)
    if method != "gguf" or not all(p.is_floating_point() for p in model.parameters()):
        return
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def load_tuned_model(
    base: str, source: str, *, trust_remote_code: bool = False, device: str | None = None
) -> Any:
    """Return a fine-tuned model: one of its own, or adapters on its base.

    Args:
        base: the hub id or path of the base model, which is loaded where adapters are put on it.
        source: the hub id or path of a model, or the folder of PEFT adapters.
        trust_remote_code: whether code that comes with the model is run.
        device: where the model is to be; None is where it loads.

    Raises:
        ImportError: `source` holds adapters, and PEFT is not installed.
        ValueError: see `load_model`; or they are adapters of another model.
    """
    if not is_adapter(source):
        return load_model(source, trust_remote_code=trust_remote_code, device=device)
    try:
        import peft
    except ImportError:
        raise ImportError(
            f'{source} holds adapters, which need PEFT: pip install "flowdata-torch[peft]"'
        ) from None
    model = load_model(base, trust_remote_code=trust_remote_code, device=device)
    model = peft.PeftModel.from_pretrained(model, source)
    check_adapters(source, model)
    return model


def is_adapter(source: str) -> bool:
    """Return whether a folder holds PEFT adapters, and not a model of its own."""
    return (Path(source) / "adapter_config.json").exists()


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer at a hub id, a folder, or a GGUF file or folder.

    Args:
        source: the hub id or path.
        trust_remote_code: whether code that comes with the tokenizer is run.

    Raises:
        FileNotFoundError: `source` names something on this machine that is not there.
        ConnectionError: it has to come from the hub, which can't be reached.
        ImportError: transformers is not installed.
        ValueError: there is no tokenizer at `source`.
    """
    transformers = load_transformers()
    folder, options = _place_of(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    # Transformers raises each of these for one kind or another of folder without a tokenizer.
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {source} ({first_line(error)}); "
            "name one with --tokenizer"
        ) from None


def check_model(source: str) -> None:
    """Check that a model is here, or may be on the hub, before anything is loaded or asked.

    A name without an owner, or of a folder here that holds no such thing, is not sent to the hub,
    unless the hub's files are on this machine already.

    Args:
        source: a hub id or path.

    Raises:
        FileNotFoundError: `source` names something on this machine that is not there.
        ConnectionError: it has to come from the hub, which can't be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return
    if not (is_local(source) or path.suffix in _WEIGHTS):
        check_reachable(source)
        return
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        if is_cached(source):
            return
    raise FileNotFoundError(nothing_at(source, "models", f"download it: hf download {source}"))


def _place_of(source: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and the option that names a GGUF file where the model is one."""
    check_model(source)
    path = Path(source).expanduser()
    source = str(path) if path.exists() else source
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    # Without a config.json transformers can't tell what the folder holds: the file has to be named.
    if path.is_dir() and not (path / "config.json").exists():
        names = sorted(file.name for file in path.glob("*.gguf"))
        if len(names) > 1:
            raise ValueError(f"{source} holds several GGUF files; name one: {', '.join(names)}")
        if names:
            return source, {"gguf_file": names[0]}
        others = ("adapter_config.json", "tokenizer_config.json", "tokenizer.json")
        if any((path / name).exists() for name in others):
            return source, {}  # adapters, or a tokenizer alone
        raise ValueError(f"{source} holds neither a config.json nor a GGUF file: it is no model")
    return source, {}


def load_transformers() -> Any:
    """Return the module transformers.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            'this needs transformers: pip install "flowdata-torch[transformers]"'
        ) from None
    return transformers
