"""How a method is judged: each module is one protocol, named after its key (see `evaluation.protocol`)."""
