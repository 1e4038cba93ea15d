"""The outbox of a batch: the state file, the result folders of the cases, and the masks that were accepted."""
