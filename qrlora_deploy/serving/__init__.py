"""A server for a bundle: requests over the network, any customer in any row of a batch."""
