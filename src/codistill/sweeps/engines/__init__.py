"""What runs the commands of a sweep."""
