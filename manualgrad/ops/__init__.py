"""The calculus: in each file, derivation, rule, function and module of an operation stand together."""
