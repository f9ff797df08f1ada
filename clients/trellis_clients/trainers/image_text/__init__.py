"""Images and their captions: encoders that are learnt from pairs."""
