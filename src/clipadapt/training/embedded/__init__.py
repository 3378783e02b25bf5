"""How the embedded model is made: its parts, what its towers are taught, and in which order (`clipadapt pretrain`)."""
