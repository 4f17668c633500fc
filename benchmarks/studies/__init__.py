"""The paper's experiments: what the losses learn, on generated pairs or your own."""
