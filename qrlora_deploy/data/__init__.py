"""From files of rows to labelled texts."""
