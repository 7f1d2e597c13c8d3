"""How much of a text its first tokens can depend on: for serving and training alike. Imports `tokenizers` alone."""
