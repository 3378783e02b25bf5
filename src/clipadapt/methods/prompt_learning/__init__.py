"""Methods that learn prompt tokens in frozen towers."""
