"""The overnight batch: it segments every scan of a folder exactly once, or records why a scan failed."""
