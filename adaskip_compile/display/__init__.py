"""What people see while long work is done, and of values in a notebook."""
