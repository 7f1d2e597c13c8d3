"""Kinds of rows: labels of texts, tags of words, and answers to prompts; and which of them a task takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples


def lacks_of_rows(task: str, writes_text: bool, answers_words: bool, examples: "Examples") -> str:
    """What a task lacks in rows of another kind; empty where they are of its own.

    Args:
        task: its name.
        writes_text: whether it takes prompts with answers.
        answers_words: whether it takes words with tags.
        examples: the rows.
    """
    if writes_text != (examples.turns is not None):
        if writes_text:
            return (
                f"its rows have labels, a {task} needs answers: the columns prompt and completion, or messages; a base "
                f"for labels is made by `warmup`"
            )
        return f"its rows are prompts and answers, a {task} needs texts and labels"
    if answers_words == (examples.words is not None):
        return ""
    if answers_words:
        return f"its texts have labels, a {task} needs tags of words: the columns tokens and tags, or text and spans"
    return f"its words have tags, a {task} needs one label a text"
