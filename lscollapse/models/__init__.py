"""Every net: read, adapted, defined, computed."""
