"""Templates, rendering and response masks: one Jinja chat template renders everything.

Training text, the mask, the prompt at inference, the GGUF's template and the Modelfile all come
from `tokenizer.chat_template`, which `prepare_tokenizer` settles once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kit.errors import KitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kit.recipe import Recipe

Message = dict[str, str]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
# STOP stands for the tokenizer's own end-of-text token. A system message takes the preamble's place.
ALPACA = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + ALPACA_PREAMBLE + "\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + 'STOP\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
PAD_CANDIDATES = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|PAD_TOKEN|>", "<|vision_pad|>", "<pad>", "[PAD]")

# Private-use characters that mark where a message's content lands in the rendered text.
_OPEN, _CLOSE = "\ue010", "\ue011"


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


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], recipe: Recipe,
           add_generation_prompt: bool = False) -> str:
    """The conversation as the model sees it; with the opening of the answer if asked."""
    return str(tokenizer.apply_chat_template(
        with_system(messages, recipe), tokenize=False, add_generation_prompt=add_generation_prompt,
        **template_kwargs(recipe)))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], recipe: Recipe) -> list[int]:
    """Token ids of a conversation up to where the answer begins."""
    text = render(tokenizer, messages, recipe, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Settle template, stop token and pad token; the same tokenizer is saved with every artefact.

    Afterwards `eos_token` is what ends an answer in the template and `pad_token` is another token, so
    that ignoring padding never means ignoring the stop. Raises KitError for a template that can't do this.
    """
    if recipe.prompt_style == "chatml":
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        if missing:
            raise KitError(f"prompt_style: chatml needs the tokens {' and '.join(missing)}, which this model lacks",
                           "set prompt_style: chat (the model's own template) or alpaca")
        tokenizer.chat_template = _bos_of(tokenizer) + CHATML
    elif recipe.prompt_style == "alpaca":
        tokenizer.chat_template = _bos_of(tokenizer) + ALPACA.replace("STOP", _literal(tokenizer.eos_token))
    elif not tokenizer.chat_template:
        raise KitError("this model has no chat template of its own (a base model?)",
                       "set prompt_style: chatml or alpaca")
    stop = stop_token(tokenizer, recipe)
    tokenizer.eos_token = stop
    if tokenizer.pad_token is None or tokenizer.pad_token == stop:
        tokenizer.pad_token = _pad_token(tokenizer, stop)
    return tokenizer


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-text token as template text, if this tokenizer opens every text with one."""
    opens = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ '" + _literal(tokenizer.bos_token) + "' }}" if opens and tokenizer.bos_token else ""


def _literal(text: str | None) -> str:
    return (text or "").replace("\\", "\\\\").replace("'", "\\'")


def _pad_token(tokenizer: PreTrainedTokenizerBase, stop: str) -> str:
    vocabulary = tokenizer.get_vocab()
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for token in [*(c for c in PAD_CANDIDATES if c in vocabulary), tokenizer.unk_token, *reversed(special)]:
        if token and token not in (stop, tokenizer.bos_token):
            return str(token)
    raise KitError(f"this tokenizer has no token besides {stop!r} to pad with",
                   "add a pad token to the model's tokenizer_config.json")


def stop_token(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    """The special token that ends an assistant turn in this template."""
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    pieces = _skeleton(tokenizer, with_system(messages, recipe), recipe)
    after = pieces[-1][1]
    special = [t.content for t in tokenizer.added_tokens_decoder.values()]
    for token in sorted({*special, tokenizer.eos_token or ""}, key=len, reverse=True):
        if token and after.startswith(token):
            return token
    raise KitError(f"the chat template ends an answer with {after[:30]!r}, which is no special token: "
                   "a model trained on it could not stop", "set prompt_style: chatml or alpaca")


def _skeleton(tokenizer: PreTrainedTokenizerBase, messages: list[Message],
              recipe: Recipe) -> list[tuple[int, str]]:
    """The template's own text: [(-1, before the first content), (index of message, text after it), …].

    Every content is replaced by a marker, so that its place in the rendered text is known exactly.
    """
    marked = [{**m, "content": f"{_OPEN}{i}{_CLOSE}"} for i, m in enumerate(messages)]
    text = str(tokenizer.apply_chat_template(marked, tokenize=False, **template_kwargs(recipe)))
    first, *rest = text.split(_OPEN)
    pieces = [(-1, first)]
    for part in rest:
        index, _, after = part.partition(_CLOSE)
        pieces.append((int(index), after))
    if [i for i, _ in pieces] != list(range(-1, len(messages))):
        raise KitError("the chat template drops or repeats a message, so its answers can't be located in the text",
                       "set prompt_style: chatml")
    return pieces


class Formatter:
    """Conversations → segments of text, each trained on or not, proven against the template itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.stop = str(tokenizer.eos_token)
        self._skeletons: dict[tuple[str, ...], list[tuple[int, str]]] = {}

    def segments(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """[(text, trained), …] whose texts joined are exactly what the template renders.

        Trained are the assistant's contents, each with its stop token. Raises KitError when the template
        changes a content on the way, because the mask would then be a guess.
        """
        messages = with_system(messages, self.recipe)
        roles = tuple(m["role"] for m in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = _skeleton(self.tokenizer, messages, self.recipe)
        rendered = render(self.tokenizer, messages, self.recipe)
        for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
            pieces = self._fill(self._skeletons[roles], roles, contents)
            if "".join(text for text, _ in pieces) == rendered:
                break
        else:
            raise KitError("the chat template rewrites a message's content, so what is trained on can't be located",
                           "set prompt_style: chatml, or leave such rows out")
        if not self.recipe.train_on_responses_only:
            return [(rendered, True)]
        return pieces

    def _fill(self, skeleton: list[tuple[int, str]], roles: tuple[str, ...],
              contents: list[str]) -> list[tuple[str, bool]]:
        pieces: list[tuple[str, bool]] = []
        plain = ""
        for index, after in skeleton:
            if index >= 0 and roles[index] == "assistant":
                if not after.startswith(self.stop):
                    raise KitError(f"the chat template does not end every answer with {self.stop!r}",
                                   "set prompt_style: chatml")
                pieces += [(plain, False), (contents[index] + self.stop, True)]
                plain = after.removeprefix(self.stop)
            else:
                plain += (contents[index] if index >= 0 else "") + after
        return [(text, trained) for text, trained in [*pieces, (plain, False)] if text]

    def encode(self, conversations: list[list[Message]]) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) for each conversation; labels are -100 where nothing is trained."""
        rows = [self.segments(messages) for messages in conversations]
        texts = [text for row in rows for text, _ in row]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        result = []
        for row in rows:
            ids: list[int] = []
            labels: list[int] = []
            for _, trained in row:
                part = next(encoded)
                ids += part
                labels += part if trained else [-100] * len(part)
            result.append((ids, labels))
        return result
