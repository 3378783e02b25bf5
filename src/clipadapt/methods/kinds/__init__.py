"""How a method learns: one base class a kind."""
