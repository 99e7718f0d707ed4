"""Speed beside what it is to be compared with, measured on the machine at hand."""
