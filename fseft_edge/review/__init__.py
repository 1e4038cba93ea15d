"""Review of the masks of a batch in the browser: a web server for this machine only, and its page."""
