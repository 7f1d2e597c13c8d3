"""Text over the network: answers that are written side by side, in the order that fairness gives."""
