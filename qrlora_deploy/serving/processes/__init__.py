"""A server of several processes: one that watches, engines that run, and fronts that talk to clients."""
