"""What the scripts in the folder above share."""
