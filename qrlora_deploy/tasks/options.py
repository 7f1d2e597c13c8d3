"""What `--task` calls the tasks, for `--help`, which imports nothing; the registry holds the tasks themselves."""

AUTO = "auto"
"""What `--task` says where the labels decide."""

OPTIONS = {
    "classification": "one name a row",
    "regression": "one number a row",
    "multi-label": "a list of names a row, or a|b",
    "token-classification": "a tag for each word of a row",
    "reranker": "a number from 0 to 1 for a pair of texts",
    "embedding": "none, for pairs of texts that belong together",
    "causal-lm": "the answer to a prompt, or chats",
}
"""By what `--task` calls a task, what its labels are."""
