"""What a reward model reads of an answer."""

import numpy as np

from moetrain.data.chat import Chat
from moetrain.data.formats import Conversation, template_kwargs_of
from moetrain.data.messages import FormatError
from moetrain.rewards.base import Completion


def tokens_of(completion: Completion, chat: Chat, most: int) -> list[int]:
    """The conversation as `method: reward` sees one in training: up to the last token that the
    assistant says, and the last `most` of those. FormatError when the chat template refuses it.
    """
    prompt = completion.columns.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [*prompt, {"role": "assistant", "content": completion.opened + completion.text}]
    trained = [*[False] * len(prompt), True]
    kwargs = template_kwargs_of(completion.columns)
    encoded = chat.encode(chat.mark(Conversation(messages, trained, kwargs)))
    if not encoded or not encoded[-1].mask.any():
        raise FormatError("the answer has no token")
    own = encoded[-1]
    end = int(np.flatnonzero(own.mask)[-1]) + 1
    return own.tokens[:end].tolist()[-most:]
