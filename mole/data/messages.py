"""Conversations, written by the tokenizer's own chat template; what the assistant says is supervised."""

from typing import Any

from mole.data.encode import Encoded, end_id, fit
from mole.data.samples import IGNORED, Sample


def encode_messages(tokenizer: Any, messages: Any, *, task: str, max_length: int | None, where: str) -> Encoded:
    """One conversation as a sample: a list of `{"role": …, "content": …}`.

    Every assistant turn is supervised, its end-of-turn token included. The prompt is all that stands before the last
    one. Raises ValueError for malformed messages, for a tokenizer without a chat template, and for a template that
    writes earlier turns differently once later ones follow: supervised tokens could not be told from the others.
    """
    check_messages(messages, where)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: the tokenizer has no chat template, which the messages format needs; "
            "use a backbone whose tokenizer has one, or the prompt/completion format"
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    ids = render(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    prompt_ids: list[int] = ids
    for turn in turns:
        prompt_ids = render(tokenizer, messages[:turn], prompting=True)
        through = render(tokenizer, messages[: turn + 1])
        if through[: len(prompt_ids)] != prompt_ids or ids[: len(through)] != through:
            raise ValueError(
                f"{where}: the chat template writes the messages before assistant turn {turn + 1} differently when it "
                "follows, so that its tokens cannot be told apart; use another template or the prompt/completion format"
            )
        labels[len(prompt_ids) : len(through)] = through[len(prompt_ids) :]
    if turns and not ends_turn(tokenizer, labels):
        ids, labels = [*ids, end_id(tokenizer)], [*labels, end_id(tokenizer)]
    completion = messages[turns[-1]]["content"] if turns else ""
    prompt = tokenizer.decode(prompt_ids)
    sample = Sample(tuple(ids), tuple(labels), task, prompt, completion, tuple(prompt_ids))
    reason = "" if turns else "it has no assistant message with a content"
    return fit(sample, max_length=max_length, where=where, reason=reason)


def render(tokenizer: Any, messages: list[dict[str, str]], prompting: bool = False) -> list[int]:
    """The ids of the messages in the tokenizer's template; `prompting` adds what asks the assistant to speak.

    The template writes the beginning-of-sequence token, so the tokenizer must not add a second one.
    """
    if not messages and not prompting:
        return []
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ends_turn(tokenizer: Any, labels: list[int]) -> bool:
    """Whether the last assistant turn closes with a special token, so that generation learns to stop."""
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    begin = end
    while begin and labels[begin - 1] != IGNORED:
        begin -= 1
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return bool(special & set(labels[begin:end]))


def check_messages(messages: Any, where: str) -> None:
    """ValueError unless `messages` is a non-empty list of objects with a role and a content, both text."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of objects with role and content")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: message {number} must have a role and a content, both text; got {message!r}")
