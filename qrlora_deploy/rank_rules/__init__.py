"""How many directions of each pivoted QR are kept: one module a rule, `registry` knows them by kind."""
