"""A stored run as a page and as a comment: what changed, how sure that is, and pictures of where it breaks even."""
