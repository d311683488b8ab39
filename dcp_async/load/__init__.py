"""One load: names are matched, ranges read and verified, and their bytes placed where they belong."""
