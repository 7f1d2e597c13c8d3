"""What answers: the queue of all requests, who is next, the batches and the session that runs them."""
