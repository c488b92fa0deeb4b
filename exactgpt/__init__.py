"""What the scripts share: flat, one noun a file. Imports model.py and itself, never a script."""
