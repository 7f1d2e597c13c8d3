"""Updates made elsewhere as coefficients of a basis: a LoRA, a tuned checkpoint, or a customer of another basis."""
