"""What `condrl <command>` and scripts/*.py do."""
