"""Methods that change few weights of the towers."""
