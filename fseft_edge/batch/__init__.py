"""The overnight batch: cases found, done exactly once or set aside with a reason, whatever happens meanwhile."""
