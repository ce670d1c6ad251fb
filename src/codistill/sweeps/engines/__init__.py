"""What runs the processes of a sweep."""
