"""The outbox of a batch: its state, the results of its cases, and which masks were accepted."""
