"""Zero-shot inference: what is encoded, or how scores are mixed, is changed; nothing is trained."""
