"""Text generation by a decoder's bundle: any customer in any row of a running batch, without torch."""
