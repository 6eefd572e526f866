"""Templates and rendering: one Jinja chat template renders everything.

Training text, the mask (kit.data.masks), the prompt at inference, the GGUF's template and the Modelfile all come
from `tokenizer.chat_template`, which `prepare_tokenizer` settles once.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kit.common.errors import KitError, nearest, one_line
from kit.common.files import PROJECT, read_json
from kit.gguf.messages import Message, for_template, texts
from kit.gguf.templates import check_template, in_time
from kit.gguf.trial import Generation, check_length
from kit.models.fetch import loading_options, model_folder, not_loaded
from kit.models.saved import code_refused
from kit.models.styles import STYLES
from kit.recipe.recipe import Recipe

PAD_CANDIDATES = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|PAD_TOKEN|>", "<|vision_pad|>", "<pad>", "[PAD]")

# Private-use characters that mark where a message's content lands in the rendered text.
OPEN, CLOSE = "\ue010", "\ue011"


def alpaca_turn(instruction: str, input: str | None = "") -> str:
    """The user's turn of an Alpaca row: the input, when there is one, under its own heading."""
    return f"{instruction}\n\n### Input:\n{input}" if input else instruction


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Extra variables the template is rendered with, the same in training, inference and export."""
    return {} if recipe.enable_thinking is None else {"enable_thinking": recipe.enable_thinking}


def with_system(messages: list[Message], recipe: Recipe) -> list[Message]:
    """Put the recipe's system prompt in front of a conversation that has none."""
    if recipe.system_prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": recipe.system_prompt}, *messages]
    return messages


def rendered(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    """What transformers makes of the messages with these template variables; every rendering in this process is here.

    The template is not trusted. Raises KitError when it loops or grows without end or is no text, TemplateError for
    whatever else it raises.
    """
    check_templates(tokenizer)
    taken, tools = for_template(messages)
    try:
        with in_time():
            # Copies, because a filter may write into them: `messages | indent` adds a line end to the list.
            text = str(tokenizer.apply_chat_template(taken, tools=tools, tokenize=False, **options))
        check_length(text, messages)
    except (KitError, TemplateError):
        raise
    except Exception as error:  # a template is a program: 1 / 0, or a macro that calls itself
        raise TemplateError(one_line(error, 200)) from None
    return text


def check_templates(tokenizer: Any) -> None:
    """Raise KitError for a template, if the tokenizer has any, that is no text or that `check_template` refuses."""
    _check(tokenizer.chat_template)


def check_saved_templates(source: str, recipe: Recipe) -> None:
    """`check_templates` of a folder or hub id, before anything renders them; a folder's without its vocabulary, which
    takes seconds to read."""
    if not (folder := Path(source)).is_dir():
        check_templates(tokenizer_of(source, recipe))
        return
    for file in (*folder.glob("*.jinja"), *folder.glob("*/*.jinja")):
        check_template(file.read_text(encoding="utf-8", errors="replace"))
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        _check(read_json(folder / name).get("chat_template"))


def _check(templates: Any) -> None:
    if isinstance(templates, list):  # as a tokenizer_config.json may name several
        templates = {number: one.get("template") if isinstance(one, dict) else one
                     for number, one in enumerate(templates)}
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if not isinstance(template, str):
            raise KitError(f"the tokenizer's chat template is no text, but {template!r:.80}",
                           "mend chat_template in its tokenizer_config.json")
        check_template(template)


def render(tokenizer: Any, messages: list[Message], recipe: Recipe, add_generation_prompt: bool = False) -> str:
    """The conversation as the model sees it; with the opening of the answer if asked.

    Raises KitError when the template refuses these turns.
    """
    try:
        return rendered(tokenizer, with_system(messages, recipe), add_generation_prompt=add_generation_prompt,
                        **template_kwargs(recipe))
    except TemplateError as error:
        turns = ", ".join(m["role"] for m in messages[:6]) + (", …" if len(messages) > 6 else "")
        raise KitError(f"the chat template refuses the turns {turns}: {one_line(error, 200)}",
                       "change the rows' roles, or set prompt_style: chatml") from None


def prompt_ids(tokenizer: Any, messages: list[Message], recipe: Recipe) -> list[int]:
    """Token ids of a conversation up to where the answer begins."""
    text = render(tokenizer, messages, recipe, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prepare_tokenizer(tokenizer: Any, recipe: Recipe) -> Any:
    """Settle template, stop token and pad token; the same tokenizer is saved with every artefact.

    Afterwards `eos_token` is what ends an answer in the template and `pad_token` is another token, so
    that ignoring padding never means ignoring the stop. Raises KitError for a template that can't do this.
    """
    if recipe.chat_template:
        tokenizer.chat_template = own_template(recipe.chat_template)
        with _named(recipe.chat_template):
            _check_opening(tokenizer, recipe)
    elif recipe.prompt_style in STYLES:
        template, tokens = STYLES[recipe.prompt_style]
        vocabulary = tokenizer.get_vocab() if tokens else {}  # made anew at each call, in 0.1 s
        if missing := [token for token in tokens if token not in vocabulary]:
            raise KitError(f"prompt_style: {recipe.prompt_style} needs the tokens {' and '.join(missing)}, which this "
                           "model lacks", "set prompt_style: chat (the model's own template) or alpaca")
        bos = "" if "bos_token" in template else _bos_of(tokenizer)
        tokenizer.chat_template = bos + template.replace("STOP", _literal(tokenizer.eos_token))
    elif not tokenizer.chat_template:
        raise KitError("this model has no chat template of its own (a base model?)",
                       "set prompt_style: chatml or alpaca")
    with _named(recipe.chat_template):
        stop = stop_token(tokenizer, recipe)
    if tokenizer.eos_token and tokenizer.eos_token != stop and "eos_token" in tokenizer.chat_template:
        # What the template writes as eos_token stays what it was, though eos_token now is what ends an answer.
        tokenizer.chat_template = f"{{% set eos_token = '{_literal(tokenizer.eos_token)}' %}}{tokenizer.chat_template}"
    tokenizer.eos_token = stop
    if tokenizer.pad_token is None or tokenizer.pad_token == stop:
        tokenizer.pad_token = _pad_token(tokenizer, stop)
    return tokenizer


def template_file(source: str) -> Path | None:
    """The file of a recipe's chat_template, or None."""
    return next((path for path in (Path(source).expanduser(), PROJECT / source) if path.is_file()), None)


def own_template(source: str) -> str:
    """The text of a recipe's chat_template. Raises KitError for a file that is none, or a template without limits."""
    path = template_file(source) or Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KitError(f"chat_template: {source}: not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        others = path.parent.glob("*.jinja") if path.parent.is_dir() else ()
        raise KitError(f"chat_template: {source}: {error.strerror}{nearest(path.name, [p.name for p in others])}",
                       "it names a file with a template in Jinja, looked up from the folder you are in") from None
    if not text.strip():
        raise KitError(f"chat_template: {source} is empty", "it holds a template in Jinja")
    with _named(source):
        check_template(text)
        try:
            ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).parse(text)
        except TemplateSyntaxError as error:
            raise KitError(f"line {error.lineno}: {error.message}") from None
    return text


@contextmanager
def _named(source: str | None) -> Iterator[None]:
    """Say of an error that it is about a template of the user's own, which can be mended."""
    try:
        yield
    except KitError as error:
        if not source:
            raise
        raise KitError(f"chat_template: {source}: {error.message}",
                       "mend the template, or name one: prompt_style: chatml, qwen or llama3") from None


def _check_opening(tokenizer: Any, recipe: Recipe) -> None:
    """Raise KitError for a template that does not open the answer when add_generation_prompt asks it to: the model
    would be left to write the control tokens of its own turn."""
    turns = marked(with_system([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], recipe))
    prompt = render(tokenizer, turns[:-1], recipe, add_generation_prompt=True)
    whole = render(tokenizer, turns, recipe)
    before = pieces(whole, list(range(len(turns))))[-2]
    opening = before.removeprefix(prompt.rpartition(CLOSE)[2]) if whole.startswith(prompt) else ""
    if any_of(control_tokens(tokenizer)).search(opening):
        raise KitError(f"with add_generation_prompt it does not write what opens an answer, {opening!r}")


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer with its template, without the model: what the data check needs."""
    return prepare_tokenizer(tokenizer_of(model_folder(recipe), recipe), recipe)


def tokenizer_of(source: str, recipe: Recipe) -> Any:
    """The tokenizer of a folder or hub id as it was saved; KitError when it can't be read."""
    from transformers import AutoTokenizer

    try:
        with code_refused(source):
            return AutoTokenizer.from_pretrained(source, **loading_options(recipe))
    except (OSError, ValueError) as error:
        raise not_loaded("tokenizer", recipe, error) from None


def control_tokens(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer as they are written: it reads them so wherever they stand in a text."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def typed(messages: list[Message], tokens: re.Pattern[str]) -> list[str]:
    """Those of the control tokens that stand in the contents as text, in their order."""
    return [token for text in texts(messages) for token in tokens.findall(text)]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of these, the longest where several begin; nothing without any."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)")


def _bos_of(tokenizer: Any) -> str:
    """The beginning-of-text token as template text, if this tokenizer opens every text with one."""
    opens = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ '" + _literal(tokenizer.bos_token) + "' }}" if opens and tokenizer.bos_token else ""


def _literal(text: str | None) -> str:
    return (text or "").replace("\\", "\\\\").replace("'", "\\'")


def _pad_token(tokenizer: Any, stop: str) -> str:
    special, vocabulary = control_tokens(tokenizer), tokenizer.get_vocab()
    known = [token for token in PAD_CANDIDATES if token in vocabulary]
    for token in [*known, tokenizer.unk_token, *reversed(special)]:
        if token and token not in (stop, tokenizer.bos_token):
            return str(token)
    raise KitError(f"this tokenizer has no token besides {stop!r} to pad with",
                   "add a pad token to the model's tokenizer_config.json")


def stop_token(tokenizer: Any, recipe: Recipe) -> str:
    """The special token that ends an assistant turn in this template."""
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    turns = marked(with_system(messages, recipe))
    after = pieces(render(tokenizer, turns, recipe), list(range(len(turns))))[-1]
    special = [t.content for t in tokenizer.added_tokens_decoder.values()]
    for token in sorted({*special, tokenizer.eos_token or ""}, key=len, reverse=True):
        if token and after.lstrip().startswith(token):
            return token
    raise KitError(f"the chat template ends an answer with {after[:30]!r}, which is no special token: "
                   "a model trained on it could not stop", "set prompt_style: chatml or alpaca")


def marked(messages: list[Message]) -> list[Message]:
    """The messages with a marker in place of each content, so that its place in the rendered text is known exactly.

    But for turns that call tools: some templates write either the calls or the content.
    """
    return [m if m.get("tool_calls") else {**m, "content": f"{OPEN}{i}{CLOSE}"} for i, m in enumerate(messages)]


def pieces(text: str, expected: list[int]) -> list[str]:
    """The text before the first marker and behind each; KitError unless `expected` markers stand there in order."""
    first, *rest = text.split(OPEN)
    marks = [part.partition(CLOSE) for part in rest]
    if [index for index, _, _ in marks] != [str(i) for i in expected]:
        raise KitError("the chat template drops, moves or repeats a message, so its answers can't be located in the "
                       "text", "set prompt_style: chatml")
    return [first, *(after for _, _, after in marks)]
