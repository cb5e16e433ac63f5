"""What can be asked for the logits of a text, each in a process of its own: one interface (`scoring.Runner`)."""
