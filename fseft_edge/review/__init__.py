"""Going through a batch's masks in the browser: a server for this machine alone, and its page."""
