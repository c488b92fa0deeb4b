"""Code that the scripts share: one topic per file, no subpackages."""
