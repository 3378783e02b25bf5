"""Methods that fine-tune towers and stay robust."""
