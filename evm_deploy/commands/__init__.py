"""Command-line programs: each parses its arguments, calls one public function and prints the result."""
