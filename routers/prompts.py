"""What a prompt has to be before it can be routed."""

from __future__ import annotations

from collections.abc import Sequence

from genprune.errors import BadCalibrationData


class BadPrompt(BadCalibrationData):
    """A prompt that cannot be routed: blank, or no text."""


def checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts as a list; a single string is one prompt.

    Raises:
        BadPrompt: there is none, one is no text, or one is blank; the message names its index.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise BadPrompt(
            f"the prompts are a {type(prompts).__name__}; expected text, or a list of texts. Pass "
            "router.route(['...'])."
        )
    if not prompts:
        raise BadPrompt("there is no prompt to route; expected at least one. Pass router.route(['...']).")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise BadPrompt(
                f"prompt {index} is a {type(prompt).__name__}, which has no words to route by; expected text. Pass "
                "text, or choose the expert yourself with expert= where the pipeline is called."
            )
        if not prompt.strip():
            raise BadPrompt(
                f"prompt {index} is blank ({prompt[:20]!r}), so that nothing says which expert it needs; expected "
                "words. Write a prompt, or choose the expert yourself with expert= where the pipeline is called."
            )
    return list(prompts)
