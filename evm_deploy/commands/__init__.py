"""The commands: arguments in, one public function called, text out."""
