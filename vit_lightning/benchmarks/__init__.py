"""Speed of this project next to a plain script and other libraries."""
