"""The policies, one noun a file."""
