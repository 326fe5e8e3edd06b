"""Other libraries' programs on sparse layers; each module is imported by name, if asked for."""
