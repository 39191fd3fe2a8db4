"""Requests as token ids: text that looks like a special token stays text, so that only masks are gaps."""

import re
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which special tokens are ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def encode_chat(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a request in the chat template: control tokens only where the template puts them."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    hidden = control.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": hidden}], tokenize=False, add_generation_prompt=True
    )
    ids, start = [], 0
    for match in control.finditer(rendered):
        ids += encode(tokenizer, rendered[start : match.start()].replace(mark, ""))
        ids.append(tokenizer.convert_tokens_to_ids(match[0]))
        start = match.end()
    return ids + encode(tokenizer, rendered[start:].replace(mark, ""))
