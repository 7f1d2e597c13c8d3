"""What a graph of packed attention takes in the place of a padded batch."""

PACKED_PRECISION = "fp16"
"""Of packed graphs. ONNX Runtime has a kernel for fp32 too, but on an H200 a customer whose numbers overflow made the
row before his own NaN there."""

PLACES = "token_places"
"""`[tokens]` int64: which token of its row each is, counted from 0."""

ROWS = "token_rows"
"""`[tokens]` int64: the row of each token."""

BORDERS = "row_borders"
"""`[rows + 1]` int32: the first token of each row, and the end of the last one."""

OFFSETS = "token_offsets"
"""`[rows, length]` int32: the positions of the tokens in a padded batch, as one row; then those of padding."""

FIRSTS = "first_tokens"
"""`[rows]` int64: the first token of each row, where these models read their answer; 0 for an empty row."""

SEATS = "token_seats"
"""`[rows, length]` int64: which token stands on each position of the padded batch; where none does, the row's first."""

PACKED_INPUTS = (PLACES, ROWS, BORDERS, OFFSETS, FIRSTS, SEATS)

INT32 = (BORDERS, OFFSETS)

AXES: dict[str, tuple[str | int, ...]] = {
    BORDERS: ("batch + 1",),
    OFFSETS: ("batch", "sequence"),
    FIRSTS: ("batch",),
    SEATS: ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
}


def packed_axes(name: str) -> tuple[str | int, ...]:
    """The axes of an input that is written from a batch; those of text have one number for each token."""
    return AXES.get(name, ("tokens",))
