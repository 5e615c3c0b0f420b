"""File tokenizer: what kilotune asks of a tokenizer, from tokenizer.json alone, without transformers and torch.

For planning and looking at data, which should not wait for libraries that compute. It stands in for a tokenizer of
transformers only where that one, too, takes tokenizer.json as it is; the tests hold both equal.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from kilotune.engine.model import sources

__all__ = ["FileTokenizer", "light_tokenizer", "open_tokenizer"]

AS_IT_IS = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes of transformers that add nothing to tokenizer.json."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def open_tokenizer(folder: Path) -> "FileTokenizer | None":
    """The tokenizer of a model's folder, or None where only transformers can make it."""
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") not in AS_IT_IS or settings.get("auto_map"):
        return None
    try:
        return FileTokenizer(folder, settings)
    except ValueError:  # transformers says what is wrong with it
        return None


def light_tokenizer(base: str, revision: str | None = None) -> Any:
    """The tokenizer of a base, without transformers where its files allow it. Raises ModelError as `load_base`."""
    found = open_tokenizer(sources.find_folder(base, revision, None, None))
    if found is not None:
        return found
    from kilotune.engine.model.base import load_tokenizer

    return load_tokenizer(base, revision=revision)


class FileTokenizer:
    """The part of transformers' tokenizers that encoding and templates use."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(str(error)) from None
        self._tokens.no_truncation()
        self._tokens.no_padding()
        for name in NAMED:
            token = settings.get(name)
            setattr(self, name, token["content"] if isinstance(token, dict) else token)
        if self.pad_token is None:
            self.pad_token = self.eos_token or self.unk_token
        self.chat_template = _chat_template(folder, settings)

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None

    def _id(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self._tokens.token_to_id(token)
        return found

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """Token ids of a text, or of each text."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = [found.ids for found in self._tokens.encode_batch(texts, add_special_tokens=add_special_tokens)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        text: str = self._tokens.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model's template lays it out. Raises jinja2.TemplateError."""
        if tokenize:
            raise ValueError("a file tokenizer renders templates as text only")
        named = {name: value for name in NAMED if (value := getattr(self, name)) is not None}
        text: str = self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **named
        )
        return text

    @cached_property
    def _template(self) -> Any:
        return _environment().from_string(self.chat_template or "")


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _environment() -> Any:
    """jinja2 as transformers sets it up: sandboxed, because a template comes with a model from anywhere."""
    import jinja2.ext
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the model writes; here it is just text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own form

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
