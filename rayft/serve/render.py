"""Conversations -> the ids that a model sees, as `rayft.data.render` makes them for training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rayft.data.messages import BadRow, as_messages
from rayft.errors import UsageError
from rayft.inference.grammar import Grammar
from rayft.serve.job import Conversation
from rayft.serve.plain_tools import with_plain_tools, without_system
from rayft.serve.tool_parser import ToolParser
from rayft.serve.tool_style import REFUSALS, ToolStyle, tool_style
from rayft.serve.tools import forced_call, shown_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


class Renderer:
    """Renders for one tokenizer and its chat template, which is an adapter's own or that of the base.

    Templates are code of whoever made the adapter: they run in the sandbox of transformers, which gives them neither
    files nor modules.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        """arguments: for the template, where a conversation does not say otherwise (`data.chat_template_kwargs`)."""
        self.tokenizer = tokenizer
        self._arguments = dict(arguments or {})

    @cached_property
    def style(self) -> ToolStyle:
        return tool_style(self.tokenizer)

    def ids(self, prompt: Conversation | str | tuple[int, ...]) -> tuple[int, ...]:
        """Token ids of a prompt. Text is tokenised with the special tokens that begin a document, ids stay.

        Raises:
            UsageError: R818 where a conversation cannot be rendered.
        """
        if isinstance(prompt, Conversation):
            return tuple(self.tokenizer(self.text(prompt), add_special_tokens=False, verbose=False)["input_ids"])
        return self._document(prompt) if isinstance(prompt, str) else prompt

    def text(self, conversation: Conversation) -> str:
        """The conversation as text, with all special tokens. Raises UsageError R818."""
        try:
            messages = as_messages([dict(message) for message in conversation.messages], "messages")
        except BadRow as error:
            raise UsageError("R818", str(error)) from error
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        tools = shown_tools(conversation)
        calling = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if not calling or self.style.native:
            return self._apply(messages, tools, conversation)
        plain = with_plain_tools(messages, tools)
        try:
            return self._apply(plain, [], conversation)
        except UsageError:
            if not tools or messages[0]["role"] == "system" or len(plain) < 2 or plain[1]["role"] != "user":
                raise
            return self._apply(without_system(plain), [], conversation)

    def parser(self, conversation: Conversation) -> ToolParser | None:
        """What reads the calls out of an answer; None where none can be called."""
        tools = shown_tools(conversation)
        return ToolParser(self.style, tools) if tools else None

    def forced_call(self, conversation: Conversation) -> Grammar | None:
        """The form of an answer that has to be a call; None where it need not be one."""
        return forced_call(self.style, shown_tools(conversation), conversation.tool_choice)

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]], conversation: Conversation) -> str:
        if not self.tokenizer.chat_template:
            hint = "send plain text to /v1/completions, or save a chat template with the adapter"
            raise UsageError("R818", "the tokenizer has no chat template, so a conversation cannot be rendered", hint)
        given = dict(conversation.template_kwargs)
        if taken := sorted(given.keys() & self._reserved):
            raise UsageError("R818", f"template_kwargs: {taken[0]} is not for the template")
        going_on = conversation.continue_final_message
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt and not going_on,
                continue_final_message=going_on,
                **(self._arguments | given),
            )
        except REFUSALS as error:
            reason = f"{type(error).__name__}: {error}"
            hint = "some templates want user and assistant to take turns, or know no system or tool messages"
            raise UsageError("R818", f"the chat template refuses the conversation: {reason}", hint) from error
        return text

    @property
    def _reserved(self) -> set[str]:
        """Arguments that decide how the template is run, and which one."""
        return {*inspect.signature(self.tokenizer.apply_chat_template).parameters} - {"documents", "kwargs"}

    def _document(self, text: str) -> tuple[int, ...]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text brings the one that the tokenizer adds
            ids = ids[1:]
        return tuple(ids[:-1] if ids[-1:] == [eos] and not text.endswith(str(self.tokenizer.eos_token)) else ids)
