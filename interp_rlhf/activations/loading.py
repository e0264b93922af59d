"""Models and tokenizers from folders and Hub ids, as the commands take them.

In: a path. Out: a decoder-only language model in float32 with its tokenizer, or one clear sentence. Adapters are put on their
base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "LMHead")


def adapter_base(path: str | Path) -> str | None:
    """The base that a folder with a PEFT adapter names; None if the folder holds no adapter.

    Raises:
        `ValueError`: its configuration names no base, or is not whole.
    """
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"`{file}` is not JSON ({error}) – it may be truncated: copy it again.") from None
    if not base:
        raise ValueError(f"`{file}` names no base model (`base_model_name_or_path`) – expected one. Write it in.")
    return str(base)


def _task(path: str | Path) -> str | None:
    """Task type in an adapter's configuration; None if it names no task."""
    found = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    return None if found is None else str(found)


def load_model(path: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A language model of a folder or Hub id, in evaluation mode; of an adapter's folder, its base with the adapter on.

    Args:
        path (`str` or `Path`): what to load.
        base (`str` or `Path`, *optional*): for an adapter: its base, in place of the one that it names.

    Raises:
        `ValueError`: an encoder-decoder, or a model without a language-model head.
    """
    from transformers import AutoConfig

    adapter = adapter_base(path)
    place = str(path) if adapter is None else str(base or adapter)
    if Path(place).is_file() or (not Path(place).exists() and place.startswith(("/", "./", "../", "~"))):
        what = "a file" if Path(place).is_file() else "not there"
        raise ValueError(f"`{place}` is {what} – expected the folder of a model, or a Hub id such as `owner/name`.")
    config = AutoConfig.from_pretrained(place)
    names = list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`{place}` is an encoder-decoder ({', '.join(names)}) – expected a decoder-only language model."
        )
    if names and not any(part in name for name in names for part in _WITH_HEAD):
        raise ValueError(
            f"`{place}` is a {', '.join(f'`{name}`' for name in names)} – expected a language model: without its head it "
            "predicts nothing, and a head of random numbers would be put in its place. Name the model that it was made from."
        )
    model = _class_of(config, names).from_pretrained(place, dtype=dtype)
    if adapter is None:
        return model.eval()
    from peft import PeftModel

    task = _task(path)
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`{path}` is an adapter of the task `{task}` – expected one of a language model (`CAUSAL_LM`): a reward model or a "
            "classifier predicts no tokens. Name the model that it was made from, or an adapter that was trained with it."
        )
    rows = _embedding_rows(Path(path))
    base_rows = model.get_input_embeddings().num_embeddings
    if rows is not None and rows != base_rows:
        raise ValueError(
            f"The adapter `{path}` holds an embedding of {rows} tokens – its base `{place}` has {base_rows}: tokens were added "
            "in training. Merge it into its base with the embedding resized, and name the merged model."
        )
    return PeftModel.from_pretrained(model, str(path)).eval()


def load_tokenizer(*places: str | Path) -> Any:
    """The tokenizer of the first place that has one.

    Raises:
        `ValueError`: none has.
    """
    from transformers import AutoTokenizer

    for place in places:
        folder = Path(place)
        if not folder.is_dir() or any((folder / name).exists() for name in TOKENIZERS):
            return AutoTokenizer.from_pretrained(str(place))
    raise ValueError(
        f"{', '.join(f'`{place}`' for place in places)} hold no tokenizer – expected one. Save the model's own there."
    )


def has_tokenizer(place: str | Path) -> bool:
    """True if a place has a tokenizer. A Hub id is assumed to have one."""
    folder = Path(place)
    return not folder.is_dir() or any((folder / name).exists() for name in TOKENIZERS)


def _class_of(config: Any, names: list[str]) -> Any:
    """`AutoModelForCausalLM`, or, where it does not know the family, the class that the config names, as TRL does."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if known or not names else getattr(transformers, names[0], AutoModelForCausalLM)


def _embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding that an adapter holds; None if it holds no embedding."""
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as found:
        names = [name for name in found.keys() if "embed_tokens" in name and "lora_" not in name]  # noqa: SIM118, no mapping
        return int(found.get_slice(names[0]).get_shape()[0]) if names else None
