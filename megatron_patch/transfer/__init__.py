"""From the sweep of a proxy to the target's config."""
